// A plan's description, as Python gives it.
#pragma once

#include <string>
#include <vector>

#include "plan.h"

namespace maml_fast {

struct ExpressionSpec {
    std::vector<double> constants;
    int registers = 0;
    std::vector<Step> steps;
    std::vector<int> outputs;
    int uniform = 0;  // of an expression over slots: so many steps, the first, read numbers and constants alone
};

struct SlotFunctionOfSpec {
    int code = -1;
    std::vector<int> numbers, gradients;
};

struct SlotFunctionSpec {
    std::vector<int> ins, outs, scalars, sums;
    std::vector<SlotFunctionOfSpec> of;  // per parameter
};

struct PointwiseSpec {
    std::vector<long> sizes;
    std::vector<std::vector<long>> strides;  // per operand
    ExpressionSpec value, backward, tangent, backward_tangent;
};

struct OpSpec {
    OpKind kind{};
    Act act{};
    std::vector<int> inputs;
    int out = -1;
    int w = -1, b = -1;    // parameters, or -1
    int c0 = -1, c1 = -1;  // constants, or -1
    long rows = 1, width = 0, out_width = 0, groups = 1;
    double f0 = 0, f1 = 0;
    Window window{1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1};
    PointwiseSpec pointwise;
    std::vector<Box> boxes;
    bool mean = false;
};

struct ParamSpec {
    std::string name;
    long size = 0;
    bool adapts = false, active = false;
    std::vector<int> rates;       // per set; -1 where it does not adapt
    long o = 0, c = 0, taps = 0;  // of a convolution's weights, else 0
};

// A tensor that is only read: a learning rate or a constant.
struct ReadSpec {
    std::string name;
    long size = 0;
};

struct Spec {
    std::vector<OpSpec> ops;
    int steady = 0;              // so many of them, the first, give the same in every inner step
    std::vector<long> features;  // per buffer; buffer 0 is the input
    std::vector<bool> once;      // per buffer: it has no sample axis
    int out = -1;
    int outputs = -1;  // the buffer that the network returns: the output, but for a loss of a person's own
    std::vector<ParamSpec> params;
    std::vector<ReadSpec> constants, rates;
    int rate_sets = 1;                    // for all inner steps, or for each
    std::size_t inputs = 0, targets = 0;  // beside buffer 0, and beside the first of the targets
    std::vector<Instr> code;
    std::vector<ExpressionSpec> codes;        // of expressions over slots
    std::vector<SlotFunctionSpec> functions;  // of pointwise instructions
    std::vector<int> tapes;                   // batch of each tape
    int slots = 0;
    int scalars = 0;  // numbers of each task
    long samples[2] = {0, 0};
    long sets = 1;  // of support samples: one for all inner steps, or one for each; those of all tasks, then the next
    LossKind loss{};
    double loss_parameter = 0;
    double loss_factor[2] = {1, 1};  // per batch
    bool input_gradients = false;
    bool reverse = false, second_order = false;
    bool low_rank = false;  // the program allows weights that are never formed
    long tasks = 0;
};

}  // namespace maml_fast
