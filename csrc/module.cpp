// The Python face of the core: plans and tensors in, nothing of torch's C++.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "check.h"
#include "describe.h"
#include "guard.h"
#include "run.h"
#include "signature.h"
#include "situation.h"
#include "tables.h"
#include "tensors.h"

namespace py = pybind11;
using namespace maml_fast;

namespace {

constexpr long kMostThreads = 1024;

// ---- a plan's description ----------------------------------------------------------------------

template <class T>
T get(const py::dict& d, const char* name) {
    return d[name].cast<T>();
}

std::string text(const py::dict& d, const char* name) { return get<std::string>(d, name); }

Window parse_window(const py::dict& d) {
    Window w{};
    w.h = get<long>(d, "h");
    w.w = get<long>(d, "w");
    w.oh = get<long>(d, "oh");
    w.ow = get<long>(d, "ow");
    w.kh = get<long>(d, "kh");
    w.kw = get<long>(d, "kw");
    w.sh = get<long>(d, "sh");
    w.sw = get<long>(d, "sw");
    w.ph = get<long>(d, "ph");
    w.pw = get<long>(d, "pw");
    w.dh = get<long>(d, "dh");
    w.dw = get<long>(d, "dw");
    return w;
}

ExpressionSpec parse_expression(const py::dict& d) {
    ExpressionSpec e;
    e.constants = get<std::vector<double>>(d, "constants");
    e.registers = get<int>(d, "registers");
    e.outputs = get<std::vector<int>>(d, "outputs");
    if (d.contains("uniform")) e.uniform = get<int>(d, "uniform");
    for (const auto& [name, out, a, b, c] : get<std::vector<std::tuple<std::string, int, int, int, int>>>(d, "steps"))
        e.steps.push_back({primitive(name), out, a, b, c});
    return e;
}

PointwiseSpec parse_pointwise(const py::dict& d) {
    return {get<std::vector<long>>(d, "sizes"), get<std::vector<std::vector<long>>>(d, "strides"),
            parse_expression(d["value"]),       parse_expression(d["backward"]),
            parse_expression(d["tangent"]),     parse_expression(d["backward_tangent"])};
}

Box parse_box(const py::dict& d) {
    Box box{};
    box.input = get<int>(d, "input");
    box.factor = get<double>(d, "factor");
    box.in = get<long>(d, "in");
    box.out = get<long>(d, "out");
    const auto sizes = get<std::vector<long>>(d, "sizes"), in = get<std::vector<long>>(d, "in_strides"),
               out = get<std::vector<long>>(d, "out_strides");
    if (sizes.size() > kMostAxes || in.size() != sizes.size() || out.size() != sizes.size())
        throw py::value_error("plan: a box has more than " + std::to_string(kMostAxes) + " axes or unequal ones");
    box.axes = int(sizes.size());
    std::copy(sizes.begin(), sizes.end(), box.sizes);
    std::copy(in.begin(), in.end(), box.in_strides);
    std::copy(out.begin(), out.end(), box.out_strides);
    return box;
}

OpSpec parse_op(const py::dict& d) {
    OpSpec op;
    op.kind = op_kind(text(d, "kind"));
    if (op.kind == OpKind::activation) op.act = activation(text(d, "act"));
    op.inputs = get<std::vector<int>>(d, "inputs");
    op.out = get<int>(d, "out");
    op.w = get<int>(d, "w");
    op.b = get<int>(d, "b");
    op.c0 = get<int>(d, "c0");
    op.c1 = get<int>(d, "c1");
    op.rows = get<long>(d, "rows");
    op.width = get<long>(d, "width");
    op.out_width = get<long>(d, "out_width");
    op.groups = get<long>(d, "groups");
    op.f0 = get<double>(d, "f0");
    op.f1 = get<double>(d, "f1");
    if (d.contains("window")) op.window = parse_window(d["window"]);
    if (d.contains("pointwise")) op.pointwise = parse_pointwise(d["pointwise"]);
    if (d.contains("boxes"))
        for (auto box : d["boxes"]) op.boxes.push_back(parse_box(box.cast<py::dict>()));
    if (d.contains("mean")) op.mean = get<bool>(d, "mean");
    return op;
}

ParamSpec parse_param(const py::dict& d) {
    ParamSpec p;
    p.name = text(d, "name");
    p.size = get<long>(d, "size");
    p.adapts = get<bool>(d, "adapts");
    p.active = get<bool>(d, "active");
    p.rates = get<std::vector<int>>(d, "rates");
    p.o = get<long>(d, "o");
    p.c = get<long>(d, "c");
    p.taps = get<long>(d, "taps");
    return p;
}

SlotFunctionSpec parse_function(const py::dict& d) {
    SlotFunctionSpec f;
    f.ins = get<std::vector<int>>(d, "ins");
    f.outs = get<std::vector<int>>(d, "outs");
    f.scalars = get<std::vector<int>>(d, "scalars");
    f.sums = get<std::vector<int>>(d, "sums");
    for (auto item : d["of"]) {
        auto of = item.cast<py::dict>();
        f.of.push_back(
            {get<int>(of, "code"), get<std::vector<int>>(of, "numbers"), get<std::vector<int>>(of, "gradients")});
    }
    return f;
}

Instr parse_instruction(const py::dict& d) {
    Instr in;
    in.code = instruction(text(d, "code"));
    const std::pair<const char*, int*> operands[] = {
        {"slot", &in.slot},     {"theta", &in.theta},     {"out", &in.out},           {"gradient", &in.gradient},
        {"vector", &in.vector}, {"adjoint", &in.adjoint}, {"tape", &in.tape},         {"batch", &in.batch},
        {"draws", &in.draws},   {"rates", &in.rates},     {"function", &in.function}, {"place", &in.place}};
    for (const std::string& field : fields_of(kInstructions[int(in.code)])) {
        const std::pair<const char*, bool*> flags[] = {
            {"seed", &in.seed}, {"inputs", &in.inputs}, {"add", &in.add}, {"weighted", &in.weighted}};
        if (auto flag =
                std::find_if(std::begin(flags), std::end(flags), [&](const auto& f) { return field == f.first; });
            flag != std::end(flags)) {
            *flag->second = get<bool>(d, field.c_str());
            continue;
        }
        if (field == "ins" || field == "outs" || field == "scalars" || field == "sums") continue;  // with the function
        if (field == "weight") {
            in.weight = get<double>(d, "weight");
            continue;
        }
        auto named = [&](const auto& operand) { return field == operand.first; };
        *std::find_if(std::begin(operands), std::end(operands), named)->second = get<int>(d, field.c_str());
    }
    return in;
}

std::vector<ReadSpec> parse_read(const py::list& list) {
    std::vector<ReadSpec> read;
    for (auto item : list) {
        auto d = item.cast<py::dict>();
        read.push_back({text(d, "name"), get<long>(d, "size")});
    }
    return read;
}

template <class F>
auto parse_list(const py::dict& d, const char* name, F parse_item) {
    std::vector<decltype(parse_item(d))> parsed;
    for (auto item : d[name]) parsed.push_back(parse_item(item.cast<py::dict>()));
    return parsed;
}

Spec parse(const py::dict& d) {
    Spec s;
    s.ops = parse_list(d, "ops", parse_op);
    s.steady = get<int>(d, "steady");
    s.features = get<std::vector<long>>(d, "features");
    s.once = get<std::vector<bool>>(d, "once");
    s.out = get<int>(d, "out");
    s.outputs = get<int>(d, "outputs");
    s.params = parse_list(d, "params", parse_param);
    s.constants = parse_read(d["constants"]);
    s.rates = parse_read(d["rates"]);
    s.rate_sets = get<int>(d, "rate_sets");
    s.inputs = get<std::size_t>(d, "inputs");
    s.targets = get<std::size_t>(d, "targets");
    s.code = parse_list(d, "code", parse_instruction);
    s.codes = parse_list(d, "codes", parse_expression);
    s.functions = parse_list(d, "functions", parse_function);
    s.tapes = get<std::vector<int>>(d, "tapes");
    s.slots = get<int>(d, "slots");
    s.scalars = get<int>(d, "scalars");
    s.samples[0] = get<long>(d, "support");
    s.samples[1] = get<long>(d, "query");
    s.sets = get<long>(d, "sets");
    s.loss = loss_kind(text(d, "loss"));
    s.loss_parameter = get<double>(d, "loss_parameter");
    std::tie(s.loss_factor[0], s.loss_factor[1]) = get<std::pair<double, double>>(d, "loss_factors");
    s.input_gradients = get<bool>(d, "input_gradients");
    s.reverse = get<bool>(d, "reverse");
    s.second_order = get<bool>(d, "second_order");
    s.low_rank = get<bool>(d, "low_rank");
    s.tasks = get<long>(d, "tasks");
    check(s);
    return s;
}

Isa isa_named(const std::string& wanted) {
    for (Isa isa : available())
        if (wanted == name(isa)) return isa;
    throw py::value_error("isa: this processor cannot run '" + wanted + "'");
}

// ---- calls -------------------------------------------------------------------------------------

// A list of tensors as addresses; read(tensor, expected) checks one.
template <class F>
std::vector<void*> addresses(const py::handle& tensors, const char* name, const std::vector<Expected>& expected,
                             F read) {
    auto list = py::reinterpret_steal<py::object>(PySequence_Fast(tensors.ptr(), "expected a list of tensors"));
    if (!list) throw py::error_already_set();
    const auto count = std::size_t(PySequence_Fast_GET_SIZE(list.ptr()));
    if (count != expected.size())
        throw py::value_error(std::string(name) + ": expected " + std::to_string(expected.size()) + " tensors, got " +
                              std::to_string(count));
    std::vector<void*> out;
    out.reserve(count);
    for (std::size_t i = 0; i < count; ++i)
        out.push_back(read(PySequence_Fast_GET_ITEM(list.ptr(), Py_ssize_t(i)), expected[i]));
    return out;
}

void check_threads(long threads) {
    if (threads < 1 || threads > kMostThreads)
        throw py::value_error("threads: expected 1.." + std::to_string(kMostThreads) + ", got " +
                              std::to_string(threads));
}

void put_times(const Times& times, py::dict spent) {
    spent["memory"] = times.memory;
    spent["packing"] = times.packing;
    spent["instructions"] = times.instructions;
    spent["waiting"] = times.waiting;
    spent["sums"] = times.sums;
}

class Plan {
  public:
    Plan(const py::dict& spec, bool float64, const std::string& isa) : Plan(parse(spec), float64, isa_named(isa)) {}

    void run(py::handle x_s, py::handle y_s, py::handle x_q, py::handle y_q, py::handle weights, py::handle cotangent,
             py::handle losses, py::handle objective, py::handle outputs, py::handle rate_gradient, py::handle dx_s,
             py::handle dx_q, py::handle params, py::handle constants, py::handle rates, py::handle adapted,
             py::handle gradients, py::handle adapted_out, py::handle inputs_s, py::handle inputs_q,
             py::handle dinputs_s, py::handle dinputs_q, py::handle targets_s, py::handle targets_q, std::uint64_t seed,
             bool add, long threads, py::object spent) {
        check_threads(threads);
        const Signature& s = signature_;
        const std::vector<Expected> none;
        Tensors tensors;
        auto read = [&](py::handle t, const Expected& e) { return tensors.read(t, e); };
        auto read_batch = [&](py::handle t, const Expected& e) { return tensors.read_batch(t, e); };
        auto made = [&](py::handle t, const Expected& e) { return tensors.made(t, e); };
        auto grown = [&](py::handle t, const Expected& e) { return add ? tensors.written(t, e) : tensors.made(t, e); };
        Call call{};
        call.tasks = tasks_;
        call.x[0] = tensors.read_batch(x_s, s.x[0]);
        call.y[0] = tensors.read_batch(y_s, s.y[0]);
        call.x[1] = tensors.read_batch(x_q, s.x[1]);
        call.y[1] = tensors.read_batch(y_q, s.y[1]);
        call.weights = tensors.read_batch(weights, s.weights);
        call.cotangent = tensors.read_batch(cotangent, s.cotangent);
        call.losses = tensors.made(losses, s.losses);
        call.objective = tensors.made(objective, s.objective);
        call.outputs = tensors.made(outputs, s.outputs);
        call.rate_gradient = tensors.made(rate_gradient, s.rate_gradient);
        call.dx[0] = tensors.made(dx_s, s.dx[0]);
        call.dx[1] = tensors.made(dx_q, s.dx[1]);
        const auto p = addresses(params, "parameters", s.params, read),
                   c = addresses(constants, "buffers", s.constants, read), r = addresses(rates, "lr", s.rates, read),
                   a = addresses(adapted, "adapted", s.adapted, read),
                   g = addresses(gradients, "gradients", s.reverse ? s.gradients : none, grown),
                   o = addresses(adapted_out, "adapted", s.adapted_out, made),
                   more_s = addresses(inputs_s, "x_s", s.inputs[0], read_batch),
                   more_q = addresses(inputs_q, "x_q", s.inputs[1], read_batch),
                   t_s = addresses(targets_s, "y_s", s.targets[0], read_batch),
                   t_q = addresses(targets_q, "y_q", s.targets[1], read_batch),
                   d_s = addresses(dinputs_s, "gradient of x_s", s.dinputs[0], made),
                   d_q = addresses(dinputs_q, "gradient of x_q", s.dinputs[1], made);
        std::int64_t outside[2] = {0, 0};
        call.params = p.data();
        call.constants = c.data();
        call.rates = r.data();
        call.adapted = a.data();
        call.gradients = s.reverse ? g.data() : nullptr;
        call.adapted_out = o.data();
        call.inputs[0] = more_s.data();
        call.inputs[1] = more_q.data();
        call.targets[0] = t_s.data();
        call.targets[1] = t_q.data();
        call.dinputs[0] = d_s.data();
        call.dinputs[1] = d_q.data();
        call.seed = seed;
        call.outside = outside;
        call.add = add;
        call.threads = int(threads);
        s.check(call);
        for (int batch = 0; batch < 2; ++batch)
            if (s.classes && s.y[batch].required) check_labels(s.y[batch], call.y[batch], s.classes);
        Times times, *timed = spent.is_none() ? nullptr : &times;
        {
            py::gil_scoped_release release;
            f64_ ? f64_->run(call, timed) : f32_->run(call, timed);
        }
        if (timed) put_times(times, spent.cast<py::dict>());
    }

    py::dict describe() const { return maml_fast::describe(f64_ ? f64_->view() : f32_->view()); }

    long bytes(long threads) const {
        check_threads(threads);
        return f64_ ? f64_->bytes(int(threads)) : f32_->bytes(int(threads));
    }
    long lanes() const { return f64_ ? f64_->lanes() : f32_->lanes(); }

  private:
    Plan(Spec spec, bool float64, Isa isa)
        : tasks_(spec.tasks), signature_(spec, float64 ? Scalar::float64 : Scalar::float32) {
        if (float64)
            f64_ = std::make_unique<Runner<double>>(std::move(spec), isa);
        else
            f32_ = std::make_unique<Runner<float>>(std::move(spec), isa);
    }

    long tasks_;
    Signature signature_;
    std::unique_ptr<Runner<float>> f32_;
    std::unique_ptr<Runner<double>> f64_;
};

void draw(py::handle out, std::uint64_t seed, std::uint32_t number, long step, std::uint32_t first_task) {
    const auto shape = out.attr("shape").cast<std::pair<long, long>>();
    const bool f64 = py::str(out.attr("dtype")).cast<std::string>() == "torch.float64";
    const Tensors tensors;
    void* y = tensors.written(out, {"out", shape.first * shape.second, f64 ? Scalar::float64 : Scalar::float32, true});
    const Draw d{number, std::uint32_t(step), first_task, seed};
    if (f64)
        draw_tasks(d, shape.first, shape.second, static_cast<double*>(y));
    else
        draw_tasks(d, shape.first, shape.second, static_cast<float*>(y));
}

// ---- tables ------------------------------------------------------------------------------------

template <std::size_t N>
py::dict table(const Entry (&entries)[N]) {
    py::dict names;
    for (const Entry& entry : entries) names[py::str(std::string(entry.name))] = py::tuple(py::cast(fields_of(entry)));
    return names;
}

std::vector<std::string> available_names() {
    std::vector<std::string> names;
    for (Isa isa : available()) names.emplace_back(name(isa));
    return names;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
    m.doc() = "Task-batched kernels for meta-learning.";
    m.def("existing_gradients", &existing_gradients, py::arg("parameters"));
    py::class_<Guard>(m, "Guard").def(py::init<const py::list&>()).def("check", &Guard::check);
    py::class_<Kinds>(m, "Kinds")
        .def(py::init<const py::list&>())
        .def("same", py::overload_cast<const py::list&>(&Kinds::same, py::const_));
    py::class_<Situation>(m, "Situation")
        .def(py::init<const py::object&, const py::object&, const py::list&, const py::list&>())
        .def("holds", &Situation::holds);
    py::class_<Plan>(m, "Plan")
        .def(py::init<const py::dict&, bool, const std::string&>(), py::arg("spec"), py::arg("float64"), py::arg("isa"))
        .def("run", &Plan::run)
        .def("describe", &Plan::describe)
        .def("bytes", &Plan::bytes, py::arg("threads"))
        .def_property_readonly("lanes", &Plan::lanes);
    find_torch();
    m.attr("OP_KINDS") = table(kOpKinds);
    m.attr("ACTIVATIONS") = table(kActivations);
    m.attr("PRIMITIVES") = table(kPrimitives);
    m.attr("LOSSES") = table(kLosses);
    m.attr("INSTRUCTIONS") = table(kInstructions);
    m.attr("MOST_THREADS") = kMostThreads;
    m.attr("MOST_AXES") = kMostAxes;
    m.attr("MOST_OPERANDS") = kMostOperands;
    m.def("available", &available_names);
    m.def("draw", &draw, py::arg("out"), py::arg("seed"), py::arg("number"), py::arg("step"), py::arg("first_task"));
    m.def("choose", [] { return std::string(name(choose())); });
}
