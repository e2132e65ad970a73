#include "check.h"

#include <algorithm>
#include <stdexcept>

#include "tables.h"

namespace maml_fast {

namespace {

constexpr std::size_t kMostJoined = 1 << 16;
constexpr double kMost = 1e15;  // elements of all buffers: their offsets stay far from overflow

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("plan: " + what); }

void require(bool good, const std::string& where, const char* what) {
    if (!good) refuse(where + ": " + what);
}

void require_equal(const std::string& what, long expected, long got) {
    if (expected != got)
        refuse(what + ": expected " + std::to_string(expected) + " elements, got " + std::to_string(got));
}

void require_index(const std::string& where, const char* what, long index, long first, std::size_t count) {
    if (index < first || index >= long(count))
        refuse(where + ": " + what + " " + std::to_string(index) + " is not in [" + std::to_string(first) + ", " +
               std::to_string(count) + ")");
}

bool is_channel_norm(OpKind kind) {
    return kind == OpKind::batch_norm || kind == OpKind::running_norm || kind == OpKind::group_norm;
}

std::string quoted(const ParamSpec& p) { return "parameter '" + p.name + "'"; }

// Every step reads what is there: what is given, constants, and registers that a step has written; so do the results,
// of which the first `optional` may be missing, at place −1.
void check_expression(const std::string& where, const ExpressionSpec& e, int given, std::size_t optional) {
    const int registers = given + int(e.constants.size());
    require(e.registers >= 0 && e.registers < (1 << 12) && e.constants.size() < (1 << 12), where,
            "an expression of too many registers or constants");
    std::vector<bool> known(std::size_t(registers + e.registers));
    std::fill_n(known.begin(), registers, true);
    auto read = [&](int place) {
        require(place >= 0 && place < int(known.size()) && known[std::size_t(place)], where,
                "a step reads a place that none has written");
    };
    for (const Step& step : e.steps) {
        const std::size_t arity = fields_of(kPrimitives[int(step.primitive)]).size();
        read(step.a);
        if (arity > 1) read(step.b);
        if (arity > 2) read(step.c);
        require((arity > 1 || step.b == -1) && (arity > 2 || step.c == -1), where, "a step has too many arguments");
        require(step.out >= registers && step.out < int(known.size()), where, "a step writes no register");
        known[std::size_t(step.out)] = true;
    }
    for (std::size_t i = 0; i < e.outputs.size(); ++i)
        if (i >= optional || e.outputs[i] != -1) read(e.outputs[i]);
}

// ---- layers ------------------------------------------------------------------------------------

class OpCheck {
  public:
    OpCheck(const Spec& spec, std::size_t index, const std::vector<bool>& made)
        : spec_(spec),
          op_(spec.ops[index]),
          g_(op_.window),
          made_(made),
          where_("layer " + std::to_string(index) + " (" + name_of(op_.kind) + ")") {}

    void run() const {
        buffers();
        sample_axes();
        sizes();
        window();
        parameters();
        shapes();
    }

  private:
    void buffers() const {
        for (int v : op_.inputs) {
            require_index(where_, "input", v, 0, spec_.features.size());
            require(made_[v], where_, "an input is read before it is written");
        }
        require_index(where_, "output", op_.out, 1, spec_.features.size());
        require(!made_[op_.out], where_, "its output is written twice");
        const auto [fewest, most] = inputs();
        require(op_.inputs.size() >= fewest && op_.inputs.size() <= most, where_, "wrong number of inputs");
    }

    // The fewest and the most inputs of this kind.
    std::pair<std::size_t, std::size_t> inputs() const {
        const OpKind kind = op_.kind;
        if (kind == OpKind::parameter || kind == OpKind::constant || kind == OpKind::target) return {0, 0};
        if (kind == OpKind::input || kind == OpKind::draw) return {0, 0};
        if (kind == OpKind::lookup) return {1, 2};
        if (kind == OpKind::add || kind == OpKind::matmul) return {2, 2};
        if (kind == OpKind::linear) return {1, 2};
        if (kind == OpKind::pointwise) return {1, kMostOperands};
        if (kind == OpKind::cat || kind == OpKind::linear_map) return {1, kMostJoined};
        return {1, 1};
    }

    // Which buffers lack the sample axis: the output does where all inputs do, or a linear map has summed over it.
    void sample_axes() const {
        bool all = true;
        for (int v : op_.inputs) all = all && spec_.once[v];
        const bool out = spec_.once[op_.out], mixes = op_.kind == OpKind::pointwise || op_.kind == OpKind::matmul;
        if (op_.kind == OpKind::linear_map || op_.kind == OpKind::draw) return;
        if (op_.kind == OpKind::target || op_.kind == OpKind::input)
            return require(!out, where_, "targets and inputs have a sample axis");
        if (op_.kind == OpKind::lookup) return lookup_axes();
        require(out == all, where_, "its output and its inputs disagree about the sample axis");
        const bool image = op_.kind == OpKind::conv || is_channel_norm(op_.kind);
        require(!(image && all), where_, "it needs a sample axis");
        for (std::size_t j = 1; j < op_.inputs.size() && !mixes; ++j) {
            const bool once = spec_.once[op_.inputs[j]];
            require(op_.kind == OpKind::linear ? once : once == all, where_, "an input has, or lacks, a sample axis");
        }
    }

    void lookup_axes() const {
        require(spec_.once[op_.out] == spec_.once[op_.inputs[0]], where_, "its rows and its indices disagree");
        require(op_.inputs.size() == 1 || spec_.once[op_.inputs[1]], where_, "its table has a sample axis");
    }

    void sizes() const {
        for (long size : {op_.rows, op_.width, op_.out_width, op_.groups})
            require(size >= 0 && double(size) < kMost, where_, "a size is out of range");
        require(op_.rows > 0 && op_.groups > 0, where_, "it has no rows or no groups");
    }

    void window() const {
        for (long size : {g_.h, g_.w, g_.oh, g_.ow, g_.kh, g_.kw, g_.sh, g_.sw, g_.dh, g_.dw})
            require(size > 0 && size < (1L << 30), where_, "a size of its window is out of range");
        for (long padding : {g_.ph, g_.pw})
            require(padding >= 0 && padding < (1L << 30), where_, "its padding is out of range");
    }

    void parameters() const {
        bool conv = op_.kind == OpKind::conv, norm = op_.kind == OpKind::layer_norm || is_channel_norm(op_.kind);
        bool weighted = conv || (op_.kind == OpKind::linear && op_.inputs.size() == 1), alone = is_alone();
        weighted = weighted || (op_.kind == OpKind::lookup && op_.inputs.size() == 1);
        for (int p : {op_.w, op_.b}) require_index(where_, "parameter", p, -1, spec_.params.size());
        bool biased = norm || (op_.kind == OpKind::linear && !weighted && op_.w < 0);
        require(weighted || alone ? op_.w >= 0 : biased || (op_.w < 0 && op_.b < 0), where_,
                "wrong number of parameters");
        require(!(alone || op_.kind == OpKind::lookup) || op_.b < 0, where_, "wrong number of parameters");
        if (op_.w >= 0) {
            require_equal(quoted(spec_.params[op_.w]), weight_size(), spec_.params[op_.w].size);
            require((spec_.params[op_.w].taps > 0) == conv, where_, "convolutions share no weights with other layers");
        }
        if (op_.b >= 0) {
            require_equal(quoted(spec_.params[op_.b]), norm ? op_.width : op_.out_width, spec_.params[op_.b].size);
            require(spec_.params[op_.b].taps == 0, where_, "its bias is a convolution's weight");
        }
        if (op_.kind == OpKind::constant) {
            require_index(where_, "constant", op_.c0, 0, spec_.constants.size());
            require_index(where_, "the query's constant", op_.c1, -1, spec_.constants.size());
            if (op_.c1 >= 0) require_equal(spec_.constants[op_.c1].name, out(), spec_.constants[op_.c1].size);
            return require_equal(spec_.constants[op_.c0].name, out(), spec_.constants[op_.c0].size);
        }
        bool constants = op_.kind == OpKind::running_norm;
        for (int c : {op_.c0, op_.c1}) {
            require_index(where_, "constant", c, constants ? 0 : -1, constants ? spec_.constants.size() : 0);
            if (constants) require_equal(spec_.constants[c].name, op_.width, spec_.constants[c].size);
        }
    }

    bool is_alone() const { return op_.kind == OpKind::parameter; }

    long weight_size() const {
        if (is_alone()) return out();
        if (op_.kind == OpKind::linear || op_.kind == OpKind::lookup) return op_.width * op_.out_width;
        if (op_.kind != OpKind::conv) return op_.width;
        const ParamSpec& p = spec_.params[op_.w];
        bool divides = op_.width % op_.groups == 0 && op_.out_width % op_.groups == 0;
        const long taps = g_.kh * g_.kw, columns = taps > 0 ? p.taps / taps : 0;  // that count as channels
        bool fits = p.o == op_.out_width && p.c * columns * op_.groups == op_.width && p.taps == taps * columns;
        require(columns <= 1 || op_.groups == 1, where_, "its kernel is as wide as the image, but it has groups");
        require(divides && fits, where_, "its weight has other dimensions than the layer");
        return p.o * p.c * p.taps;
    }

    long in(std::size_t j = 0) const { return spec_.features[op_.inputs[j]]; }
    long out() const { return spec_.features[op_.out]; }

    void features(long expected_in, long expected_out) const {
        require_equal(where_ + ", input of a sample", expected_in, in());
        require_equal(where_ + ", output of a sample", expected_out, out());
    }

    void images(bool fits) const {
        require(fits, where_, "its window does not fit the image");
        features(g_.h * g_.w * op_.width, g_.oh * g_.ow * op_.out_width);
    }

    void shapes() const {
        switch (op_.kind) {
            case OpKind::linear:
                if (op_.inputs.size() == 2) require_equal(where_ + ", the weight", op_.width * op_.out_width, in(1));
                return features(op_.rows * op_.width, op_.rows * op_.out_width);
            case OpKind::parameter:
            case OpKind::constant:
                return;
            case OpKind::target:
                require_index(where_, "target", int(op_.width), 0, spec_.targets + 1);
                return require(spec_.loss == LossKind::value, where_, "a named loss reads the targets itself");
            case OpKind::input:
                return require_index(where_, "input", int(op_.width), 0, spec_.inputs);
            case OpKind::draw:
                return require(out() % op_.rows == 0 && op_.width < (1L << 31), where_, "its rows do not divide it");
            case OpKind::lookup:
                require(op_.width > 0 && op_.width <= (1L << 24), where_, "no or too many rows of a table");
                if (op_.inputs.size() == 2) require_equal(where_ + ", the table", op_.width * op_.out_width, in(1));
                return features(op_.rows, op_.rows * op_.out_width);
            case OpKind::check:
                return features(in(), 1);
            case OpKind::pointwise:
                return pointwise();
            case OpKind::linear_map:
                return boxes();
            case OpKind::matmul:
                require_equal(where_ + ", the second factor", op_.groups * op_.width * op_.out_width, in(1));
                return features(op_.groups * op_.rows * op_.width, op_.groups * op_.rows * op_.out_width);
            case OpKind::softmax:
            case OpKind::log_softmax:
                return features(op_.rows * op_.width, op_.rows * op_.width);
            case OpKind::max:
                return features(op_.rows * op_.width * op_.out_width, op_.rows * op_.out_width);
            case OpKind::layer_norm:
            case OpKind::transpose:
                return features(op_.rows * op_.width, op_.rows * op_.width);
            case OpKind::activation:
            case OpKind::affine:
                return features(out(), out());
            case OpKind::add:
                require_equal(where_ + ", second input of a sample", out(), in(1));
                return features(out(), out());
            case OpKind::cat:
                return joined();
            case OpKind::batch_norm:
            case OpKind::running_norm:
            case OpKind::group_norm:
                require(op_.width > 0 && op_.width % op_.groups == 0, where_, "its groups do not divide the channels");
                require(g_.oh == g_.h / g_.kh && g_.ow == g_.w / g_.kw, where_, "its windows do not tile the image");
                return features(g_.h * g_.w * op_.width, g_.oh * g_.ow * op_.width);
            case OpKind::conv:
                return images(true);
            case OpKind::max_pool:
            case OpKind::avg_pool:
                return images(op_.width == op_.out_width);
            case OpKind::pad:
                return images(op_.width == op_.out_width && g_.oh == g_.h + 2 * g_.ph && g_.ow == g_.w + 2 * g_.pw);
            case OpKind::upsample:
                return images(op_.width == op_.out_width && g_.oh == g_.h * g_.sh && g_.ow == g_.w * g_.sw);
        }
    }

    void pointwise() const {
        const PointwiseSpec& p = op_.pointwise;
        require(!p.sizes.empty() && p.sizes.size() <= kMostAxes, where_, "too few or too many axes");
        require(p.strides.size() == op_.inputs.size(), where_, "not one list of strides for each operand");
        double elements = 1;
        for (long size : p.sizes) {
            require(size > 0, where_, "an axis without elements");
            elements *= double(size);
        }
        require(elements == double(out()), where_, "its axes do not make up its output");
        for (std::size_t j = 0; j < p.strides.size(); ++j) {
            require(p.strides[j].size() == p.sizes.size(), where_, "not one stride for each axis");
            inside(p.sizes, p.strides[j], 0, in(j));
        }
        const std::size_t n = op_.inputs.size();
        expression(p.value, 1);
        expression(p.backward, n);
        expression(p.tangent, 1);
        expression(p.backward_tangent, n);
    }

    void expression(const ExpressionSpec& e, std::size_t outputs) const {
        require(e.outputs.size() == outputs, where_, "an expression has another number of results");
        check_expression(where_, e, 2 * int(op_.inputs.size()) + 2, 0);
    }

    // Whether start + Σ i·stride stays within `most` elements.
    template <class Sizes, class Strides>
    void inside(const Sizes& sizes, const Strides& strides, long start, long most) const {
        double low = double(start), high = double(start);
        for (std::size_t axis = 0; axis < sizes.size(); ++axis) {
            const double reach = double(strides[axis]) * double(sizes[axis] - 1);
            (reach < 0 ? low : high) += reach;
        }
        require(low >= 0 && high < double(most), where_, "it reaches beyond a buffer");
    }

    void boxes() const {
        for (const Box& box : op_.boxes) {
            require_index(where_, "input of a box", box.input, 0, op_.inputs.size());
            const std::vector<long> sizes(box.sizes, box.sizes + box.axes);
            for (long size : sizes) require(size > 0, where_, "a box without elements");
            inside(sizes, box.in_strides, box.in, in(std::size_t(box.input)));
            inside(sizes, box.out_strides, box.out, out());
        }
    }

    void joined() const {
        long sum = 0;
        for (std::size_t j = 0; j < op_.inputs.size(); ++j) {
            require(in(j) % op_.rows == 0, where_, "its runs do not divide an input");
            sum += in(j);
        }
        require_equal(where_ + ", output of a sample", sum, out());
    }

    const Spec& spec_;
    const OpSpec& op_;
    const Window& g_;
    const std::vector<bool>& made_;
    std::string where_;
};

// ---- the program -------------------------------------------------------------------------------

class CodeCheck {
  public:
    CodeCheck(const Spec& spec, std::size_t index)
        : spec_(spec),
          in_(spec.code[index]),
          where_("instruction " + std::to_string(index) + " (" + name_of(in_.code) + ")") {}

    void run() const {
        switch (in_.code) {
            case Code::load:
                slot(in_.slot, 1);
                return place();
            case Code::forward:
                slot(in_.theta, 0);
                if (in_.batch == 0 && spec_.sets > 1) require_index(where_, "step", in_.draws, 0, spec_.sets);
                return tape(in_.batch);
            case Code::support_loss:
                return tape(0);
            case Code::query_loss:
                return tape(1);
            case Code::cotangent:
            case Code::store_outputs:
                return tape(1);
            case Code::backward:
                slot(in_.theta, 0);
                if (in_.out != -1) slot(in_.out, 1);
                tape(in_.batch);
                require(in_.batch == 0 || spec_.reverse, where_, "the plan keeps no query tape to go back through");
                return inputs();
            case Code::update:
                slot(in_.out, 1);
                slot(in_.theta, 0);
                return slot(in_.gradient, 1);
            case Code::scale:
            case Code::add:
            case Code::subtract:
                slot(in_.out, 1);
                return slot(in_.vector, 1);
            case Code::pointwise:
                return function();
            case Code::hvp:
                slot(in_.theta, 0);
                slot(in_.vector, 1);
                slot(in_.out, 1);
                tape(0);
                require(spec_.reverse && spec_.second_order, where_, "the plan keeps no second derivatives");
                return inputs();
            case Code::rate_gradient:
                slot(in_.gradient, 1);
                return slot(in_.adjoint, 1);
            case Code::accumulate:
            case Code::store_gradients:
                return slot(in_.vector, 1);
            case Code::store_parameters:
                slot(in_.theta, 0);
                return place();
        }
    }

  private:
    // Slot 0 is the caller's, which may only be read as parameters.
    void slot(int index, int first) const { require_index(where_, "slot", index, first, std::size_t(spec_.slots)); }

    // Whatever a rule keeps of a parameter, a slot holds each tensor of it.
    void place() const { require_index(where_, "place", in_.place, 0, std::size_t(spec_.slots)); }

    void tape(int batch) const {
        require_index(where_, "tape", in_.tape, 0, spec_.tapes.size());
        require(spec_.tapes[in_.tape] == batch, where_, "its tape is of the other batch");
        require(spec_.samples[batch] > 0, where_, "its batch has no samples");
    }

    void function() const {
        require_index(where_, "function", in_.function, 0, spec_.functions.size());
        const SlotFunctionSpec& f = spec_.functions[std::size_t(in_.function)];
        for (int i : f.ins) slot(i, 0);
        for (int i : f.outs) slot(i, 1);
        for (int i : f.scalars) require_index(where_, "number of the task", i, 0, std::size_t(spec_.scalars));
        for (int i : f.sums) {
            require_index(where_, "sum", i, 0, std::size_t(spec_.scalars));
            require(std::count(f.scalars.begin(), f.scalars.end(), i) == 0, where_, "it sums up what it reads");
        }
        require(f.of.size() == spec_.params.size(), where_, "its function is not of every parameter");
        for (std::size_t p = 0; p < f.of.size(); ++p) {
            const SlotFunctionOfSpec& of = f.of[p];
            if (of.code == -1) continue;
            require_index(where_, "code", of.code, 0, spec_.codes.size());
            require(spec_.params[p].active, where_, "it works on a parameter that no slot holds");
            for (int set : of.numbers) number(spec_.params[p], set);
            for (int set : of.gradients) number(spec_.params[p], set);
            code(spec_.codes[std::size_t(of.code)], f, of, spec_.params[p]);
        }
    }

    void number(const ParamSpec& p, int set) const {
        require_index(where_, "number", set, 0, p.rates.size());
        require_index(where_, "number", p.rates[std::size_t(set)], 0, spec_.rates.size());
    }

    void code(const ExpressionSpec& e, const SlotFunctionSpec& f, const SlotFunctionOfSpec& of,
              const ParamSpec& p) const {
        const std::size_t slots = f.ins.size(), own = slots + f.scalars.size(), given = own + of.numbers.size();
        require(given + e.constants.size() + std::size_t(e.registers) <= kMostPlaces, where_, "too many places");
        check_expression(where_, e, int(given), f.outs.size());
        const std::size_t results = f.outs.size() + f.sums.size() + of.gradients.size();
        require(e.outputs.size() == results, where_, "another number of results");
        require_index(where_, "number of uniform steps", e.uniform, 0, e.steps.size() + 1);
        std::vector<bool> uniform(given + e.constants.size() + std::size_t(e.registers));
        std::fill(uniform.begin() + std::ptrdiff_t(slots), uniform.begin() + std::ptrdiff_t(own), true);
        for (std::size_t i = own; i < given; ++i) {
            const int rate = p.rates[std::size_t(of.numbers[i - own])];
            uniform[i] = spec_.rates[std::size_t(rate)].size == 1;
        }
        std::fill_n(uniform.begin() + std::ptrdiff_t(given), e.constants.size(), true);
        for (int s = 0; s < e.uniform; ++s) {
            const Step& step = e.steps[std::size_t(s)];
            for (int place : {step.a, step.b, step.c})
                require(place < 0 || uniform[std::size_t(place)], where_, "a uniform step reads elements");
            uniform[std::size_t(step.out)] = true;
        }
    }

    void inputs() const {
        require(!in_.inputs || spec_.input_gradients, where_, "the plan has no gradients of inputs");
    }

    const Spec& spec_;
    const Instr& in_;
    std::string where_;
};

// ---- the rest ----------------------------------------------------------------------------------

void check_sizes(const Spec& s) {
    require(s.tasks > 0 && s.samples[0] >= 0 && s.samples[1] >= 0, "sizes", "no tasks or a negative number of samples");
    require(s.sets > 0 && double(s.sets) * double(s.tasks) < kMost, "sizes", "no sets of support samples, or too many");
    require(s.sets == 1 || s.steady == 0, "sizes", "what differs between inner steps cannot be steady");
    require(!s.features.empty() && s.slots > 0, "sizes", "no buffers or no slots");
    require(s.once.size() == s.features.size() && !s.once[0], "sizes", "not every buffer has or lacks a sample axis");
    std::size_t filled = s.code.size() + 1;
    for (const SlotFunctionSpec& f : s.functions) filled += f.outs.size();
    require(std::size_t(s.slots) <= filled, "sizes", "more slots than instructions fill");
    require(s.scalars >= 0 && std::size_t(s.scalars) <= s.code.size(), "sizes", "more numbers of a task than sums");
    double sum = 1;
    for (long features : s.features) {
        require(features > 0, "sizes", "a buffer without elements");
        sum += double(features);
    }
    double samples = double(std::max(s.samples[0], s.samples[1])), parameters = 1;
    for (const ParamSpec& p : s.params) {
        require(p.size >= 0 && p.o >= 0 && p.c >= 0 && p.taps >= 0, quoted(p), "a negative size");
        parameters += double(p.size);
    }
    double tapes = double(s.tapes.size() + s.code.size() + 1), most = tapes * sum * samples + s.slots * parameters;
    require(most < kMost && double(s.tasks * s.sets) * (sum * samples + parameters) < kMost, "sizes", "too large");
}

void check_rates(const Spec& s) {
    bool read = std::any_of(s.code.begin(), s.code.end(), [](const Instr& in) {
        return in.code == Code::update || in.code == Code::scale || in.code == Code::rate_gradient;
    });
    for (const ReadSpec& rate : s.rates) require(rate.size > 0, rate.name, "a rate without elements");
    require(s.rate_sets > 0, "rates", "no set of them");
    for (const Instr& in : s.code) require_index("program", "rates", in.rates, 0, std::size_t(s.rate_sets));
    for (const ParamSpec& p : s.params) {
        require(p.rates.size() == std::size_t(s.rate_sets), quoted(p), "it has not one rate in every set");
        for (int index : p.rates) {
            require_index(quoted(p), "rate", index, p.adapts && read ? 0 : -1, s.rates.size());
            if (index < 0) continue;
            const ReadSpec& rate = s.rates[std::size_t(index)];
            require_equal(rate.name + " of " + quoted(p), rate.size == 1 ? 1 : p.size, rate.size);
        }
    }
}

// Weights of convolutions are packed by the layer that reads them.
void check_convolved(const Spec& s) {
    for (std::size_t i = 0; i < s.params.size(); ++i) {
        bool conv = std::any_of(s.ops.begin(), s.ops.end(),
                                [&](const OpSpec& op) { return op.kind == OpKind::conv && op.w == int(i); });
        require(conv || s.params[i].taps == 0, quoted(s.params[i]), "taps of a parameter that no convolution reads");
    }
}

// Neither a parameter that adapts nor a random number: then what they read, which stands before them, depends on none.
void check_steady(const Spec& s) {
    require_index("steady", "count", s.steady, 0, s.ops.size() + 1);
    for (int i = 0; i < s.steady; ++i) {
        const OpSpec& op = s.ops[std::size_t(i)];
        bool moves = op.kind == OpKind::draw;
        for (int p : {op.w, op.b}) moves = moves || (p >= 0 && s.params[std::size_t(p)].adapts);
        require(!moves, "layer " + std::to_string(i), "it differs between inner steps");
    }
}

constexpr std::size_t kMostInputs = 1 << 10;

// What several operations of a kind read of one tensor is of one size and type.
void check_given(const Spec& s, OpKind kind, std::size_t count, const char* what) {
    require(count <= kMostInputs, what, "too many of them");
    std::vector<const OpSpec*> first(count);
    for (const OpSpec& op : s.ops) {
        if (op.kind != kind) continue;
        const OpSpec*& known = first[std::size_t(op.width)];
        const bool same = !known || (s.features[known->out] == s.features[op.out] && known->f0 == op.f0);
        require(same, what, "one is read as of several shapes or types");
        known = &op;
    }
}

// A loss of a person's own is one number for each task; all targets that it reads are the same.
void check_output(const Spec& s) {
    const bool value = s.loss == LossKind::value;
    require(s.once[s.out] == value, "output", "it has, or lacks, a sample axis");
    require_index("outputs", "buffer", s.outputs, 0, s.features.size());
    require(!s.once[s.outputs] && (value || s.outputs == s.out), "outputs", "the network does not return this buffer");
    if (!value) return;
    require_equal("output", 1, s.features[s.out]);
    check_given(s, OpKind::target, s.targets + 1, "targets");
}

}  // namespace

void check(const Spec& s) {
    check_sizes(s);
    check_rates(s);
    std::vector<bool> made(s.features.size());
    made[0] = true;
    for (std::size_t i = 0; i < s.ops.size(); ++i) {
        OpCheck(s, i, made).run();
        made[s.ops[i].out] = true;
    }
    check_convolved(s);
    check_steady(s);
    check_given(s, OpKind::input, s.inputs, "inputs");
    require_index("output", "buffer", s.out, 1, s.features.size());
    require(made[s.out], "output", "no layer writes it");
    require(s.outputs < 0 || s.outputs >= int(made.size()) || made[s.outputs], "outputs", "no layer writes it");
    check_output(s);
    for (int batch : s.tapes) require_index("tapes", "batch", batch, 0, 2);
    for (const Instr& in : s.code) require_index("program", "batch", in.batch, 0, 2);
    for (std::size_t i = 0; i < s.code.size(); ++i) CodeCheck(s, i).run();
}

}  // namespace maml_fast
