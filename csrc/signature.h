// Which tensors a plan's calls bring, and how long each of them is.
#pragma once

#include <string>
#include <vector>

#include "spec.h"

namespace maml_fast {

enum class Scalar { float32, float64, int64 };

// A tensor of a call.
struct Expected {
    std::string name;
    long elements = 0;
    Scalar scalar{};
    bool required = false;  // else it may be absent
};

struct Signature {
    Signature(const Spec& spec, Scalar scalar);

    // What no tensor by itself shows. Throws std::invalid_argument.
    void check(const Call& call) const;

    // per batch: support, query
    Expected x[2], y[2], dx[2];
    Expected weights, cotangent, losses, objective, outputs, rate_gradient;
    std::vector<Expected> inputs[2], dinputs[2];  // beside x
    std::vector<Expected> targets[2];             // beside y
    std::vector<Expected> params, constants, rates, adapted, gradients, adapted_out;
    // Of the caller's vectors: the parameters, and behind them the tensors of a rule's state, which may be absent.
    int loads = 0, stores = 0;
    bool reverse = false;  // whether there are gradients
    bool scores = false;   // whether there are losses or an objective
    long classes = 0;      // labels lie in [0, classes); 0 where targets are values

  private:
    void read_code(const Spec& spec);
    void read_targets(const Spec& spec, Scalar scalar);
    void read_inputs(const Spec& spec, Scalar scalar);
    void read_adapted(const Spec& spec, Scalar scalar);

    bool reads_targets = true, reads_x = false;
    bool own_gradients = false;  // what is stored is a gradient of each task's own
};

}  // namespace maml_fast
