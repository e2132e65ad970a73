// What describes an operation of a family: plain old data, like all of a plan.
#pragma once

#include "names.h"

namespace maml_fast {

// ---- pointwise: a function of operands, element by element, in blocks ----------------------------

// out = primitive(a, b, c). Places: of n operands x first, then their tangents, dy and ey, the constants, the
// registers.
struct Step {
    Primitive primitive;
    int out, a, b, c;
};

struct Expression {
    const double* constants;
    int n_constants;
    int places;
    const Step* steps;
    int n_steps;
    const int* outputs;  // places
    int n_outputs;
};

constexpr int kMostOperands = 8;
constexpr int kMostAxes = 8;

// An expression over slots, numbers of the task and of the inner rule. Places: the slots that are read, the task's
// numbers, the rule's, the constants, the registers. Steps that read numbers and constants alone come first: they are
// done once, in double precision. Results: the slots', the sums', the gradients of the rule's numbers.
struct SlotCode {
    Expression expression;
    int n_uniform;
    const bool* direct;  // per slot that it writes: the result may be computed where it is to stand
};

// What an instruction over slots does to one parameter.
struct SlotFunctionOf {
    const SlotCode* code;  // null where it leaves the parameter alone
    const int* numbers;    // sets of the parameter's rates
    const int* gradients;  // likewise, of the numbers whose gradients the outputs behind the slots' are
    int n_numbers, n_gradients;
    bool runs_on;  // it is the same as of the parameter before, which ends in a slot where this one begins
};

struct SlotFunction {
    const int* ins;
    int n_ins;
    const int* outs;
    int n_outs;
    const int* scalars;  // numbers of the task that are read
    int n_scalars;
    const int* sums;  // and those that become the sum over all elements
    int n_sums;
    const SlotFunctionOf* of;  // per parameter
};

constexpr int kMostPlaces = 1024;  // of a SlotCode

// Operands broadcast to the output's axes: where one has a single element its stride is 0.
struct Pointwise {
    int operands;
    int axes;
    long sizes[kMostAxes];  // of a sample's output
    long strides[kMostOperands][kMostAxes];
    bool whole[kMostOperands];  // the operand's elements are the output's, in the same order
    Expression value, backward, tangent, backward_tangent;
};

inline int tangent_place(const Pointwise& p, int operand) { return p.operands + operand; }
inline int delta_place(const Pointwise& p) { return 2 * p.operands; }
inline int tangent_delta_place(const Pointwise& p) { return 2 * p.operands + 1; }
inline int first_constant(const Pointwise& p) { return 2 * p.operands + 2; }

// ---- linear maps: sums of scaled copies between boxes --------------------------------------------

// out[o + Σ i·out_stride] += factor · in[n + Σ i·in_stride] for all i below the sizes. Transposed: the other way round.
struct Box {
    int input;
    double factor;
    long in, out;
    int axes;
    long sizes[kMostAxes], in_strides[kMostAxes], out_strides[kMostAxes];
};

struct LinearMap {
    const Box* boxes;
    int n_boxes;
    bool assigns;                    // every element of the output is written once
    const bool* assigns_transposed;  // per input: so is every element of it, by the transpose
    bool mean;                       // over the samples, where the output has none and an input has
};

}  // namespace maml_fast
