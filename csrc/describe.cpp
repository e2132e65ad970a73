#include "describe.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "tables.h"

namespace py = pybind11;

namespace maml_fast {

namespace {

std::vector<long> list(const long* p, long n) { return {p, p + n}; }

py::dict operation(const Op& op) {
    py::dict d;
    d["kind"] = op.kind == OpKind::activation ? std::string(kActivations[int(op.act)].name) : name_of(op.kind);
    d["inputs"] = std::vector<int>(op.in, op.in + op.n_in);
    d["out"] = op.out;
    d["parameters"] = std::vector<int>{op.w, op.b};
    d["low_rank"] = op.low_rank;
    d["behind_conv"] = op.behind_conv;
    d["own_panels"] = op.own_panels;
    return d;
}

py::dict instruction(const Instr& in) {
    const std::pair<const char*, int> operands[] = {
        {"slot", in.slot},         {"theta", in.theta},           {"out", in.out},
        {"gradient", in.gradient}, {"vector", in.vector},         {"adjoint", in.adjoint},
        {"tape", in.tape},         {"batch", in.batch},           {"draws", in.draws},
        {"rates", in.rates},       {"function", in.function},     {"place", in.place},
        {"step", in.step},         {"group_size", in.group_size}, {"sample_tiles", in.sample_tiles}};
    py::dict d;
    d["code"] = name_of(in.code);
    for (const auto& [name, value] : operands) d[name] = value;
    d["seed"] = in.seed;
    d["weight"] = in.weight;
    d["add"] = in.add;
    d["inputs"] = in.inputs;
    d["weighted"] = in.weighted;
    d["in_place"] = in.in_place;
    d["scaled"] = in.scaled;
    return d;
}

// Offsets by name, as they are in the first sample tile.
template <class View>
py::dict places(const PlanView& plan, const View& view, long buffers) {
    py::dict d;
    d["value"] = list(view.value, buffers);
    d["delta"] = list(view.delta, buffers);
    d["aux1"] = list(view.aux1, plan.n_ops);
    d["aux2"] = list(view.aux2, plan.n_ops);
    return d;
}

}  // namespace

py::dict describe(const PlanView& plan) {
    py::list ops, code, tapes, tangents;
    const long buffers = plan.buffers;
    for (int i = 0; i < plan.n_ops; ++i) {
        py::dict d = operation(plan.ops[i]);
        d["steady"] = i < plan.steady;
        ops.append(d);
    }
    int n_tapes = 0, n_slots = 1;
    for (const Instr* in = plan.code; in < plan.code + plan.n_code; ++in) {
        code.append(instruction(*in));
        n_tapes = std::max(n_tapes, in->tape + 1);
        for (int slot : {in->slot, in->theta, in->out, in->gradient, in->vector, in->adjoint, in->step})
            n_slots = std::max(n_slots, slot + 1);
        if (in->code != Code::pointwise) continue;
        const SlotFunction& f = plan.functions[in->function];
        for (int i = 0; i < f.n_outs; ++i) n_slots = std::max(n_slots, f.outs[i] + 1);
    }
    for (int t = 0; t < n_tapes; ++t) {
        py::dict d = places(plan, plan.tapes[t][0], buffers);
        d["loss"] = plan.tapes[t][0].loss;
        d["batch"] = plan.tapes[t][0].batch;
        tapes.append(d);
    }
    for (int h = 0; h < plan.n_hvps; ++h) tangents.append(places(plan, plan.tangents[h], buffers));
    py::dict d;
    d["ops"] = ops;
    d["code"] = code;
    d["features"] = list(plan.features, buffers);
    d["tapes"] = tapes;
    d["tangents"] = tangents;
    d["gathered"] = list(plan.gathered, buffers);
    d["slots"] = list(plan.slots, n_slots);
    d["scratch"] = std::vector<long>{plan.scratch, plan.norm_scratch, plan.gemm_scratch};
    d["workspace"] = plan.workspace;
    d["packed"] = plan.packed;
    d["sums"] = plan.sums + plan.rates;
    d["lockstep"] = plan.lockstep;
    d["blocks"] = plan.blocks;
    return d;
}

}  // namespace maml_fast
