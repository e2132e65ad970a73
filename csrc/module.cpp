// The Python face of the core: plans in, raw pointers in, nothing of torch.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "guard.h"
#include "run.h"

namespace py = pybind11;
using namespace maml_fast;

namespace {

using Pointer = std::uintptr_t;

const void* address(Pointer p) { return reinterpret_cast<const void*>(p); }
void* writable(Pointer p) { return reinterpret_cast<void*>(p); }

std::vector<void*> addresses(const std::vector<Pointer>& pointers) {
    std::vector<void*> out;
    out.reserve(pointers.size());
    for (Pointer p : pointers) out.push_back(writable(p));
    return out;
}

Spec parse(const py::dict& d) {
    Spec s;
    for (auto item : d["ops"]) {
        auto o = item.cast<py::dict>();
        s.ops.push_back({o["kind"].cast<int>(), o["act"].cast<int>(), o["inputs"].cast<std::vector<int>>(),
                         o["out"].cast<int>(), o["w"].cast<int>(), o["b"].cast<int>(), o["c0"].cast<int>(),
                         o["c1"].cast<int>(), o["rows"].cast<long>(), o["width"].cast<long>(),
                         o["out_width"].cast<long>(), o["groups"].cast<long>(), o["f0"].cast<double>(),
                         o["f1"].cast<double>(), o["window"].cast<std::vector<long>>()});
    }
    s.features = d["features"].cast<std::vector<long>>();
    s.out = d["out"].cast<int>();
    for (auto item : d["params"]) {
        auto p = item.cast<py::dict>();
        s.params.push_back({p["size"].cast<long>(), p["adapts"].cast<bool>(), p["active"].cast<bool>(),
                            p["rate"].cast<int>(), p["elementwise"].cast<bool>(), p["o"].cast<long>(),
                            p["c"].cast<long>(), p["taps"].cast<long>()});
    }
    for (auto item : d["code"]) {
        auto c = item.cast<py::dict>();
        s.code.push_back({Code(c["code"].cast<int>()),
                          c["a"].cast<int>(),
                          c["b"].cast<int>(),
                          c["c"].cast<int>(),
                          c["d"].cast<int>(),
                          c["inputs"].cast<bool>(),
                          c["batch"].cast<int>(),
                          -1,
                          -1,
                          false,
                          1,
                          1,
                          {nullptr, 0},
                          {nullptr, 0}});
    }
    s.tapes = d["tapes"].cast<std::vector<int>>();
    s.slots = d["slots"].cast<int>();
    s.samples[0] = d["support"].cast<long>();
    s.samples[1] = d["query"].cast<long>();
    s.rate_sizes = d["rate_sizes"].cast<std::vector<long>>();
    s.loss = d["loss"].cast<int>();
    s.loss_parameter = d["loss_parameter"].cast<double>();
    s.input_gradients = d["input_gradients"].cast<bool>();
    s.reverse = d["reverse"].cast<bool>();
    s.second_order = d["second_order"].cast<bool>();
    s.low_rank = d["low_rank"].cast<bool>();
    s.tasks = d["tasks"].cast<long>();
    return s;
}

Isa isa_named(const std::string& wanted) {
    for (Isa isa : available())
        if (wanted == name(isa)) return isa;
    throw py::value_error("isa: this processor cannot run '" + wanted + "'");
}

class Plan {
  public:
    Plan(const py::dict& spec, bool float64, const std::string& isa) {
        Spec parsed = parse(spec);
        tasks_ = parsed.tasks;
        if (float64)
            f64_ = std::make_unique<Runner<double>>(std::move(parsed), isa_named(isa));
        else
            f32_ = std::make_unique<Runner<float>>(std::move(parsed), isa_named(isa));
    }

    // inputs: x_s, y_s, x_q, y_q, weights, cotangent; outputs: losses, objective, query outputs, rate gradient, dx_s,
    // dx_q.
    void run(const std::array<Pointer, 6>& inputs, const std::array<Pointer, 6>& outputs,
             const std::vector<Pointer>& params, const std::vector<Pointer>& constants,
             const std::vector<Pointer>& rates, const std::vector<Pointer>& adapted,
             const std::vector<Pointer>& gradients, const std::vector<Pointer>& adapted_out, bool add, int threads) {
        auto p = addresses(params), c = addresses(constants), r = addresses(rates), a = addresses(adapted),
             g = addresses(gradients), o = addresses(adapted_out);
        Call call{};
        call.tasks = tasks_;
        call.params = p.data();
        call.constants = c.data();
        call.rates = r.data();
        call.adapted = a.data();
        call.x[0] = address(inputs[0]);
        call.y[0] = address(inputs[1]);
        call.x[1] = address(inputs[2]);
        call.y[1] = address(inputs[3]);
        call.weights = address(inputs[4]);
        call.cotangent = address(inputs[5]);
        call.losses = writable(outputs[0]);
        call.objective = writable(outputs[1]);
        call.outputs = writable(outputs[2]);
        call.rate_gradient = writable(outputs[3]);
        call.dx[0] = writable(outputs[4]);
        call.dx[1] = writable(outputs[5]);
        call.gradients = gradients.empty() ? nullptr : g.data();
        call.adapted_out = o.data();
        call.add = add;
        call.threads = threads;
        py::gil_scoped_release release;
        f64_ ? f64_->run(call) : f32_->run(call);
    }

    long bytes(int threads) const { return f64_ ? f64_->bytes(threads) : f32_->bytes(threads); }
    long lanes() const { return f64_ ? f64_->lanes() : f32_->lanes(); }

  private:
    long tasks_;
    std::unique_ptr<Runner<float>> f32_;
    std::unique_ptr<Runner<double>> f64_;
};

std::vector<std::string> available_names() {
    std::vector<std::string> names;
    for (Isa isa : available()) names.emplace_back(name(isa));
    return names;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
    m.doc() = "Task-batched kernels for meta-learning.";
    bind_guard(m);
    py::class_<Plan>(m, "Plan")
        .def(py::init<const py::dict&, bool, const std::string&>(), py::arg("spec"), py::arg("float64"), py::arg("isa"))
        .def("run", &Plan::run)
        .def("bytes", &Plan::bytes, py::arg("threads"))
        .def_property_readonly("lanes", &Plan::lanes);
    m.def("available", &available_names);
    m.def("choose", [] { return std::string(name(choose())); });
}
