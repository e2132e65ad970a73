#include "signature.h"

#include <algorithm>
#include <stdexcept>

namespace maml_fast {

namespace {

// Those of a list that the program touches: the others have no elements.
void require_used(std::vector<Expected>& list) {
    for (Expected& e : list) e.required = e.elements > 0;
}

long given_samples(const Spec& s, int batch) { return s.tasks * s.samples[batch] * (batch == 0 ? s.sets : 1); }

}  // namespace

Signature::Signature(const Spec& s, Scalar scalar) {
    bool labels = s.loss == LossKind::cross_entropy;
    long out = s.features[s.out];
    classes = labels ? out : 0;
    const char* const names[3][2] = {{"x_s", "x_q"}, {"y_s", "y_q"}, {"gradient of x_s", "gradient of x_q"}};
    for (int b = 0; b < 2; ++b) {
        long samples = given_samples(s, b);
        x[b] = {names[0][b], samples * s.features[0], scalar, false};
        y[b] = {names[1][b], labels ? samples : samples * out, labels ? Scalar::int64 : scalar, false};
        dx[b] = {names[2][b], samples * s.features[0], scalar, false};
    }
    if (s.loss == LossKind::value) read_targets(s, scalar);
    weights = {"weights", s.tasks, scalar, false};
    cotangent = {"cotangent", s.tasks * s.samples[1] * out, scalar, false};
    losses = {"losses", s.tasks, scalar, false};
    objective = {"objective", 1, scalar, false};
    outputs = {"outputs", s.tasks * s.samples[1] * s.features[s.outputs], scalar, false};
    long rate_elements = 0;
    for (const ReadSpec& r : s.rates) {
        rates.push_back({r.name, r.size, scalar, true});
        rate_elements += r.size;
    }
    rate_gradient = {"gradient of lr", rate_elements, scalar, false};
    for (const ReadSpec& c : s.constants) constants.push_back({"buffer '" + c.name + "'", c.size, scalar, true});
    for (const ParamSpec& p : s.params) {
        std::string quoted = "'" + p.name + "'";
        params.push_back({"parameter " + quoted, p.size, scalar, true});
        gradients.push_back({"gradient of " + quoted, p.size, scalar, false});
    }
    read_inputs(s, scalar);
    read_code(s);
    read_adapted(s, scalar);
}

// Vector by vector, of each a tensor for every parameter.
void Signature::read_adapted(const Spec& s, Scalar scalar) {
    for (int place = 0; place < std::max(loads, stores); ++place)
        for (const ParamSpec& p : s.params) {
            const std::string name = (place == 0 ? "adapted '" : "state of '") + p.name + "'";
            const Expected e{name, s.tasks * p.size, scalar, false};
            if (place < loads) adapted.push_back(e);
            if (place < stores) adapted_out.push_back(e);
            if (place < loads) adapted.back().required = place == 0 && p.adapts;
            if (place < stores) adapted_out.back().required = place == 0 && (!own_gradients || (p.adapts && p.active));
        }
}

// Buffer 0, and what stands beside it: only of the batches that the program works on.
void Signature::read_inputs(const Spec& s, Scalar scalar) {
    for (const OpSpec& op : s.ops)
        for (int v : op.inputs) reads_x = reads_x || v == 0;
    reads_x = reads_x || s.out == 0;
    for (int b = 0; b < 2; ++b) {
        const bool used = std::count(s.tapes.begin(), s.tapes.end(), b) > 0;
        const std::string name = b == 0 ? "x_s" : "x_q";
        for (std::size_t i = 0; used && i < s.inputs; ++i) inputs[b].push_back({name, 0, scalar, false});
        dinputs[b] = inputs[b];
    }
    for (const OpSpec& op : s.ops) {
        if (op.kind != OpKind::input) continue;
        for (int b = 0; b < 2; ++b) {
            if (inputs[b].empty()) continue;
            Expected& e = inputs[b][std::size_t(op.width)];
            const long elements = given_samples(s, b) * s.features[op.out];
            e = {e.name, elements, op.f0 != 0 ? Scalar::int64 : scalar, true};
            if (op.f0 == 0) dinputs[b][std::size_t(op.width)] = {"gradient of " + e.name, elements, scalar, false};
        }
    }
}

// Of a loss of a person's own: as its graph reads them, if it does.
void Signature::read_targets(const Spec& s, Scalar scalar) {
    reads_targets = false;
    for (int b = 0; b < 2; ++b) {
        y[b].elements = 0;
        targets[b].assign(s.targets, {y[b].name, 0, scalar, false});
    }
    for (const OpSpec& op : s.ops) {
        if (op.kind != OpKind::target) continue;
        reads_targets = reads_targets || op.width == 0;
        for (int b = 0; b < 2; ++b) {
            Expected& e = op.width == 0 ? y[b] : targets[b][std::size_t(op.width - 1)];
            e.elements = given_samples(s, b) * s.features[op.out];
            e.scalar = op.f0 != 0 ? Scalar::int64 : scalar;
        }
    }
}

void Signature::read_code(const Spec& s) {
    for (const Instr& in : s.code) switch (in.code) {
            case Code::load:
                loads = std::max(loads, in.place + 1);
                break;
            case Code::forward:
                x[in.batch].required = reads_x;
                break;
            case Code::support_loss:
                y[0].required = reads_targets;
                require_used(targets[0]);
                break;
            case Code::query_loss:
                scores = true;
                y[1].required = reads_targets;
                require_used(targets[1]);
                weights.required = weights.required || in.seed;
                break;
            case Code::cotangent:
                cotangent.required = true;
                break;
            case Code::backward:
                dx[in.batch].required = dx[in.batch].required || in.inputs;
                if (in.inputs) require_used(dinputs[in.batch]);
                break;
            case Code::hvp:
                dx[0].required = dx[0].required || in.inputs;
                if (in.inputs) require_used(dinputs[0]);
                y[0].required = reads_targets;
                require_used(targets[0]);
                break;
            case Code::accumulate:
                reverse = true;
                weights.required = weights.required || in.weighted;
                break;
            case Code::store_parameters:
                stores = std::max(stores, in.place + 1);
                break;
            case Code::store_gradients:
                stores = std::max(stores, 1);
                own_gradients = true;
                break;
            case Code::store_outputs:
                outputs.required = true;
                break;
            case Code::update:
            case Code::scale:
            case Code::pointwise:
            case Code::add:
            case Code::subtract:
            case Code::rate_gradient:
                break;  // of slots
        }
}

void Signature::check(const Call& call) const {
    if (scores && !call.losses && !call.objective)
        throw std::invalid_argument("losses: expected them or an objective, got neither");
    if (call.objective && !call.weights) throw std::invalid_argument("weights: expected them for an objective");
    if (call.objective && !scores) throw std::invalid_argument("objective: the program computes no losses");
}

}  // namespace maml_fast
