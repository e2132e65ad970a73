#include "layout.h"

#include <algorithm>
#include <utility>

namespace maml_fast {

namespace {

constexpr long kWorkspaceBytes = 384 << 10;  // what tasks in lockstep may take: most of a private cache
constexpr long kLockstep = 8;
constexpr long kSampleTileBytes = 1 << 20;    // what a sample tile may take beside its tape
constexpr long kSampleTileRows = 96;          // rows from which products run at full speed
constexpr long kLargeModel = 1 << 16;         // parameters from which fewer partial sums are cheaper
constexpr long kFewBlocks = 4, kBlocks = 16;  // partial sums a call is cut into, whatever the number of threads
constexpr double kBlockWork = 4e6;            // multiply-adds below which a block costs more than it shares out

// Whether an operation has no parameters and treats every number, or every sample's numbers, by itself.
bool is_plain(OpKind kind) {
    return kind == OpKind::activation || kind == OpKind::affine || kind == OpKind::add || kind == OpKind::cat;
}

// Whether an operation treats every sample by itself, and its parameters' gradients are products that add up.
bool goes_by_sample(const Op& op) {
    bool own_weight = op.kind == OpKind::linear && !op.low_rank && op.n_in == 1;
    return !op.once && (is_plain(op.kind) || own_weight);
}

}  // namespace

void Layout::add_op(const OpSpec& s) {
    Op op{};
    op.kind = s.kind;
    op.act = s.act;
    op.in = s.inputs.data();
    op.n_in = int(s.inputs.size());
    op.out = s.out;
    op.w = s.w;
    op.b = s.b;
    op.c0 = s.c0;
    op.c1 = s.c1;
    op.rows = s.rows;
    op.width = s.width;
    op.out_width = s.out_width;
    op.groups = s.groups;
    op.f0 = s.f0;
    op.f1 = s.f1;
    op.window = s.window;
    op.once = is_once(s) && std::all_of(s.inputs.begin(), s.inputs.end(), [&](int v) { return spec_.once[v]; });
    op.packs = s.w >= 0 && std::none_of(ops_.begin(), ops_.end(), [&](const Op& o) { return o.w == s.w; });
    if (op.kind == OpKind::conv) {
        convolutions_.push_back(std::make_unique<ConvolutionTables>(op.window, s.width, s.out_width, s.groups));
        op.conv = &convolutions_.back()->view();
    }
    ops_.push_back(op);
}

Layout::Layout(Spec spec, const Machine& machine) : spec_(std::move(spec)), machine_(machine) {
    for (const OpSpec& s : spec_.ops) add_op(s);
    find_low_rank();
    for (std::size_t i = 0; i < spec_.params.size(); ++i) add_param(int(i));
    find_low_rank_terms();
    find_sample_tiles();
    fuse_steps();
    find_groups();
    find_slots();
    for (const ReadSpec& rate : spec_.rates) {
        rate_offsets_.push_back(view_.rates);
        view_.rates += rate.size;
    }

    add_functions();
    find_flags();
    find_steady();
    find_sets();
    find_pairs();
    add_families();
    place_panels();
    view_.blocks = blocks();
    long lockstep = tiled() ? 1 : std::min((spec_.tasks + view_.blocks - 1) / view_.blocks, kLockstep);
    do {
        place_buffers(lockstep);
    } while (used_ * machine_.scalar_bytes > kWorkspaceBytes && lockstep-- > 1);
    fill_view();
}

const RateOf* Layout::add_rates(const ParamSpec& s) {
    RateOf* rates = rates_.emplace_back(std::make_unique<RateOf[]>(s.rates.size())).get();
    for (std::size_t set = 0; set < s.rates.size(); ++set) {
        const int index = s.rates[set];
        const bool elementwise = index >= 0 && spec_.rates[std::size_t(index)].size > 1;
        rates[set] = {index, elementwise, s.taps && elementwise ? packed(s.size) : -1};
    }
    return rates;
}

bool Layout::has_rate_per_element(const ParamSpec& s) const {
    return std::any_of(s.rates.begin(), s.rates.end(),
                       [&](int index) { return index >= 0 && spec_.rates[std::size_t(index)].size > 1; });
}

void Layout::add_param(int index) {
    const ParamSpec& s = spec_.params[index];
    bool formed = std::none_of(ops_.begin(), ops_.end(), [&](const Op& op) { return op.low_rank && op.w == index; });
    bool dense = s.active && formed;
    Param p{};
    p.size = s.size;
    p.offset = dense ? view_.parameters : -1;
    p.sum = s.active ? view_.sums : -1;
    p.rates = add_rates(s);
    p.adapts = s.adapts && dense;
    p.o = s.o;
    p.c = s.c;
    p.taps = s.taps;
    p.packed = s.taps ? packed(s.size) : -1;
    params_.push_back(p);
    if (dense) view_.parameters += s.size;
    if (s.active) view_.sums += s.size;
}

// What a view points to is final by now.
void Layout::fill_view() {
    view_.tasks = spec_.tasks;
    view_.ops = ops_.data();
    view_.n_ops = int(ops_.size());
    view_.buffers = int(spec_.features.size());
    view_.features = spec_.features.data();
    view_.once = once_.get();
    view_.out = spec_.out;
    view_.outputs = spec_.outputs;
    view_.params = params_.data();
    view_.n_params = int(params_.size());
    view_.rate_sets = spec_.rate_sets;
    view_.code = spec_.code.data();
    view_.n_code = int(spec_.code.size());
    view_.rate_offset = rate_offsets_.data();
    std::copy(spec_.samples, spec_.samples + 2, view_.samples);
    view_.loss = spec_.loss;
    view_.loss_parameter = spec_.loss_parameter;
    std::copy_n(spec_.loss_factor, 2, view_.loss_factor);
}

// Multiply-adds of one task, by the textbook.
double Layout::work() const {
    double sample = 0, passes = 0;
    for (const Op& op : ops_) {
        if (op.kind == OpKind::linear) sample += double(op.rows * op.width * op.out_width);
        if (op.kind == OpKind::matmul) sample += double(op.groups * op.rows * op.width * op.out_width);
        if (op.kind == OpKind::conv) sample += double(op.window.oh * op.window.ow) * double(spec_.params[op.w].size);
    }
    for (const Instr& in : spec_.code) {
        double n = double(spec_.samples[in.batch]);
        if (in.code == Code::forward) passes += n;
        if (in.code == Code::backward) passes += 2 * n;
        if (in.code == Code::hvp) passes += 6 * n;
    }
    return sample * passes;
}

// A power of two, so that an even number of threads finds an even number of blocks.
long Layout::blocks() const {
    double most = double(spec_.tasks) * work() / kBlockWork;
    long blocks = kFewBlocks, limit = view_.sums > kLargeModel ? kBlocks / 2 : kBlocks;
    while (blocks < limit && 2 * double(blocks) <= most) blocks *= 2;
    return std::min(blocks, spec_.tasks);
}

// A linear layer's gradient from few samples has low rank: where forming W_k for every task costs more
// than multiplying by its factors, it is never formed. Per task, in multiply-adds:
//   formed:   the products with the direction, and about 16 passes over W-sized memory
//   factored: Gram matrices of the factors, in the query passes and in the Hessian-vector products
void Layout::find_low_rank() {
    if (!spec_.low_rank) return;
    long steps =
        std::count_if(spec_.code.begin(), spec_.code.end(), [](const Instr& i) { return i.code == Code::update; });
    for (Op& op : ops_) {
        if (op.kind != OpKind::linear || op.w < 0 || op.once) continue;
        const ParamSpec& p = spec_.params[op.w];
        long uses = std::count_if(ops_.begin(), ops_.end(), [&](const Op& o) { return o.w == op.w || o.b == op.w; });
        if (!p.adapts || !p.active || has_rate_per_element(p) || uses > 1) continue;
        double rank = double(steps * spec_.samples[0] * op.rows), query = double(spec_.samples[1] * op.rows);
        double factored = 4 * rank * (query + rank) * double(op.width + op.out_width);
        double formed = (2 * rank + 16) * double(op.width * op.out_width);
        op.low_rank = factored < formed;
    }
}

// Follows the program once to learn which terms every low-rank slot consists of at each instruction.
void Layout::find_low_rank_terms() {
    for (Instr& in : spec_.code)
        if (in.code == Code::hvp) in.hvp = hvps_++;
    // else no lists: over K steps they would hold K² terms
    if (std::none_of(ops_.begin(), ops_.end(), [](const Op& op) { return op.low_rank; })) return;
    std::vector<Terms> slots(spec_.slots);
    terms_.reserve(2 * spec_.code.size());
    for (Instr& in : spec_.code) {
        keep_terms(in, slots);
        follow(in, slots);
    }
}

// The terms that an instruction reads.
void Layout::keep_terms(Instr& in, const std::vector<Terms>& slots) {
    auto keep = [&](const Terms& list) {
        terms_.push_back(list);
        return LowRankTerms{terms_.back().data(), int(terms_.back().size())};
    };
    bool network = in.code == Code::forward || in.code == Code::backward || in.code == Code::hvp;
    if (network) in.theta_terms = keep(slots[in.theta]);
    if (in.code == Code::hvp) in.vector_terms = keep(slots[in.vector]);
    if (in.code == Code::accumulate) in.theta_terms = keep(slots[in.vector]);
}

namespace {

// rates: the set that scales them, or -1.
void subtract(const std::vector<LowRankTerm>& from, int rates, std::vector<LowRankTerm>& to) {
    for (const LowRankTerm& f : from) to.push_back({f.origin, f.tape, f.hvp, -f.sign, f.rates >= 0 ? f.rates : rates});
}

}  // namespace

// The terms that an instruction's slot consists of behind it.
void Layout::follow(const Instr& in, std::vector<Terms>& slots) {
    switch (in.code) {
        case Code::backward:
            if (in.out >= 0) slots[in.out] = {{Origin::gradient, in.tape, -1, 1, -1}};
            break;
        case Code::update: {
            Terms following = slots[in.theta];
            subtract(slots[in.gradient], in.rates, following);
            slots[in.out] = std::move(following);
            break;
        }
        case Code::scale:
            slots[in.out] = slots[in.vector];
            for (LowRankTerm& f : slots[in.out]) f.rates = in.rates;
            break;
        case Code::hvp:
            slots[in.out] = {{Origin::tangent_delta, in.tape, in.hvp, 1, -1},
                             {Origin::tangent_input, in.tape, in.hvp, 1, -1}};
            break;
        case Code::add:
            slots[in.out].insert(slots[in.out].end(), slots[in.vector].begin(), slots[in.vector].end());
            break;
        case Code::subtract:
            subtract(slots[in.vector], -1, slots[in.out]);
            break;
        case Code::load:
        case Code::forward:
        case Code::support_loss:
        case Code::query_loss:
        case Code::cotangent:
        case Code::pointwise:
        case Code::rate_gradient:
        case Code::accumulate:
        case Code::store_parameters:
        case Code::store_gradients:
        case Code::store_outputs:
            break;  // these write no slot of terms
    }
}

// Samples of a task that do not fit into a private cache go through the network in sample tiles.
void Layout::find_sample_tiles() {
    if (ops_.empty() || !std::all_of(ops_.begin(), ops_.end(), goes_by_sample)) return;
    long features = 0, rows = 1;
    for (std::size_t v = 1; v < spec_.features.size(); ++v) features += spec_.features[v];
    for (const Op& op : ops_) rows = std::max(rows, op.rows);
    long bytes = 4 * features * machine_.scalar_bytes;  // values, deltas and the tangents of both
    long length = std::max(kSampleTileBytes / bytes, (kSampleTileRows + rows - 1) / rows);
    for (int batch = 0; batch < 2; ++batch) sample_tiles_[batch] = std::max(1L, spec_.samples[batch] / length);
}

// What goes through a sample tile before the next begins, and what a later group reads of a tape.
void Layout::find_groups() {
    reread_.assign(spec_.tapes.size(), Reread::nothing);
    for (std::size_t i = 0; i < spec_.code.size(); i += std::size_t(spec_.code[i].group_size)) {
        Instr& in = spec_.code[i];
        in.group_size = in.sample_tiles = 1;
        int tape = in.tape;
        if (tape < 0) continue;
        in.sample_tiles = int(sample_tiles_[spec_.tapes[tape]]);
        auto follows = [&](std::size_t j) {
            return j < spec_.code.size() && spec_.code[j].tape == tape && spec_.code[j].code != Code::forward;
        };
        while (follows(i + std::size_t(in.group_size))) ++in.group_size;
        if (in.code == Code::forward) continue;
        bool products = std::all_of(&in, &in + in.group_size, [](const Instr& j) { return j.code == Code::hvp; });
        reread_[tape] = std::max(reread_[tape], products ? Reread::curvature : Reread::everything);
    }
}

// Whether Hessian-vector products read a buffer's value or delta. Those of linear layers read the values that they take
// in and the deltas of what they give out, activations and sums neither, other layers all that they touch.
bool Layout::read_by_hvp(int buffer, bool delta) const {
    bool last = (buffer == spec_.out || buffer == spec_.outputs) && !delta;  // the loss reads it, or the caller
    return last || std::any_of(ops_.begin(), ops_.end(), [&](const Op& op) {
               bool takes = std::count(op.in, op.in + op.n_in, buffer) > 0, gives = op.out == buffer;
               if (op.kind == OpKind::linear && op.n_in == 1) return delta ? gives : takes;
               return !is_plain(op.kind) && (takes || gives);
           });
}

// Whether every gradient is one product of one linear layer, whose result can go anywhere.
bool Layout::steps_fuse() const {
    std::vector<int> uses(params_.size());
    for (const Op& op : ops_)
        for (int p : {op.w, op.b}) {
            if (p < 0) continue;
            if (op.kind != OpKind::linear || op.low_rank || ++uses[p] > 1) return false;
        }
    return std::none_of(spec_.params.begin(), spec_.params.end(),
                        [&](const ParamSpec& p) { return p.adapts && has_rate_per_element(p); });
}

// Per slot: whether all that ever reads it is the instruction right behind the one that writes it.
std::vector<bool> Layout::passed_on() const {
    std::vector<bool> passed(std::size_t(spec_.slots), true);
    for (std::size_t i = 0; i < spec_.code.size(); ++i) {
        const Instr& in = spec_.code[i];
        int fresh = i > 0 ? spec_.code[i - 1].out : -1;
        const int changed = in.code == Code::subtract || in.code == Code::add ? in.out : -1;
        for (int slot : {in.theta, in.gradient, in.vector, in.adjoint, changed})
            if (slot >= 0 && slot != fresh) passed[std::size_t(slot)] = false;
        if (in.code == Code::pointwise)
            for (int slot : spec_.functions[std::size_t(in.function)].ins) passed[std::size_t(slot)] = false;
    }
    return passed;
}

// Gradients that only feed a step are added to the parameters where the product ends. With one rate for all, so are
// Hessian-vector products to the adjoint, H(−αλ) = −α Hλ, and the last of them to the sum over tasks. Not in place
// where there are several sample tiles: the next one still reads the parameters and the adjoint.
void Layout::fuse_steps() {
    if (!steps_fuse()) return;
    const std::vector<Instr>& code = spec_.code;
    const std::vector<bool> passed = passed_on();
    std::vector<Instr> fused;
    for (std::size_t i = 0; i < code.size(); ++i) {
        Instr in = code[i];
        if (is_step(i, passed) && (sample_tiles_[0] == 1 || code[i + 1].out != in.theta)) {
            in.rates = code[i + 1].rates;
            in.step = code[++i].out;
            in.out = -1;
        } else if (is_adjoint_step(i, passed)) {
            bool last = is(i + 3, Code::accumulate) && code[i + 3].vector == in.vector;
            if (last || sample_tiles_[0] == 1) {
                int adjoint = in.vector;
                in = code[i + 1];
                in.vector = in.out = adjoint;
                in.in_place = in.scaled = true;
                i += 2;
            }
            if (last) {
                fused.push_back(code[++i]);
                in.out = kSums;
            }
        } else if (is_subtracted(i, passed)) {
            in.in_place = true;
            in.out = code[++i].out;
            if (is(i + 1, Code::accumulate) && code[i + 1].vector == in.out) {
                fused.push_back(code[++i]);
                in.out = kSums;
            }
        }
        fused.push_back(in);
    }
    spec_.code = std::move(fused);
}

bool Layout::is(std::size_t i, Code wanted) const { return i < spec_.code.size() && spec_.code[i].code == wanted; }

// Whether a gradient is made at i for the step behind it alone. `passed`: see passed_on().
bool Layout::is_step(std::size_t i, const std::vector<bool>& passed) const {
    if (!is(i, Code::backward) || !is(i + 1, Code::update)) return false;
    const Instr &in = spec_.code[i], &update = spec_.code[i + 1];
    return update.gradient == in.out && update.theta == in.theta && in.out >= 0 && passed[std::size_t(in.out)];
}

// Whether λ ← λ − H (αλ) begins at i, with one α for all.
bool Layout::is_adjoint_step(std::size_t i, const std::vector<bool>& passed) const {
    bool one_rate = spec_.rates.size() == 1 && spec_.rates[0].size == 1;
    if (!one_rate || !is(i, Code::scale) || !is(i + 1, Code::hvp) || !is(i + 2, Code::subtract)) return false;
    const Instr &scale = spec_.code[i], &hvp = spec_.code[i + 1], &subtract = spec_.code[i + 2];
    return hvp.vector == scale.out && subtract.vector == hvp.out && subtract.out == scale.vector &&
           passed[std::size_t(scale.out)] && passed[std::size_t(hvp.out)];
}

// Whether λ ← λ − H v begins at i, for a v of its own.
bool Layout::is_subtracted(std::size_t i, const std::vector<bool>& passed) const {
    if (!is(i, Code::hvp) || !is(i + 1, Code::subtract)) return false;
    const Instr &hvp = spec_.code[i], &subtract = spec_.code[i + 1];
    return subtract.vector == hvp.out && subtract.out != hvp.vector && passed[std::size_t(hvp.out)];
}

// Which slots the program still names.
void Layout::find_slots() {
    used_slots_.assign(spec_.slots, false);
    auto use = [&](int slot) {
        if (slot >= 0) used_slots_[std::size_t(slot)] = true;
    };
    for (const Instr& in : spec_.code) {
        for (int slot : {in.slot, in.theta, in.out, in.gradient, in.vector, in.adjoint, in.step}) use(slot);
        if (in.code != Code::pointwise) continue;
        for (int slot : spec_.functions[std::size_t(in.function)].ins) use(slot);
        for (int slot : spec_.functions[std::size_t(in.function)].outs) use(slot);
    }
}

// What pointwise instructions do to the parameters, in the order of the slots.
void Layout::add_functions() {
    for (std::size_t c = 0; c < spec_.codes.size(); ++c) {
        const ExpressionSpec& e = spec_.codes[c];
        codes_.push_back({{e.constants.data(), int(e.constants.size()), 0, e.steps.data(), int(e.steps.size()),
                           e.outputs.data(), int(e.outputs.size())},
                          e.uniform,
                          find_direct(e, int(c))});
    }
    for (const SlotFunctionSpec& f : spec_.functions) {
        std::vector<SlotFunctionOf>& of = functions_of_.emplace_back();
        for (std::size_t p = 0; p < f.of.size(); ++p) {
            const SlotFunctionOfSpec& s = f.of[p];
            SlotCode* code = s.code >= 0 && params_[p].offset >= 0 ? &codes_[std::size_t(s.code)] : nullptr;
            if (code) {  // functions that share it may give it different numbers of places
                const int given = int(f.ins.size() + f.scalars.size() + s.numbers.size());
                const int own = code->expression.n_constants + spec_.codes[std::size_t(s.code)].registers;
                code->expression.places = std::max(code->expression.places, given + own);
            }
            of.push_back({code, s.numbers.data(), s.gradients.data(), int(s.numbers.size()), int(s.gradients.size()),
                          code && runs_on(f, p)});
        }
        functions_.push_back({f.ins.data(), int(f.ins.size()), f.outs.data(), int(f.outs.size()), f.scalars.data(),
                              int(f.scalars.size()), f.sums.data(), int(f.sums.size()), of.data()});
    }
    view_.functions = functions_.data();
}

// Of the results of a code: whether a step of single elements makes it, into a slot that none of its functions reads.
const bool* Layout::find_direct(const ExpressionSpec& e, int index) {
    bool* direct = direct_.emplace_back(std::make_unique<bool[]>(e.outputs.size())).get();
    for (std::size_t i = 0; i < e.outputs.size(); ++i) {
        direct[i] = std::count(e.outputs.begin(), e.outputs.end(), e.outputs[i]) == 1 &&
                    std::any_of(e.steps.begin() + e.uniform, e.steps.end(),
                                [&](const Step& s) { return s.out == e.outputs[i]; });
    }
    for (const SlotFunctionSpec& f : spec_.functions) {
        if (std::none_of(f.of.begin(), f.of.end(), [&](const auto& of) { return of.code == index; })) continue;
        for (std::size_t i = 0; i < f.outs.size(); ++i)
            if (std::count(f.ins.begin(), f.ins.end(), f.outs[i]) > 0) direct[i] = false;
    }
    return direct;
}

// Whether a parameter is moved as the one before it is, by the same numbers, and its elements follow that one's.
bool Layout::runs_on(const SlotFunctionSpec& f, std::size_t p) const {
    if (p == 0 || f.of[p].code != f.of[p - 1].code || std::count(f.ins.begin(), f.ins.end(), 0) > 0) return false;
    const Param &before = params_[p - 1], &now = params_[p];
    if (before.offset < 0 || now.adapts != before.adapts || now.offset != before.offset + before.size) return false;
    const std::vector<int>&these = f.of[p].numbers, &those = f.of[p - 1].numbers;
    for (std::size_t i = 0; i < these.size(); ++i) {
        const int rate = spec_.params[p].rates[std::size_t(these[i])];
        const bool same = rate == spec_.params[p - 1].rates[std::size_t(those[i])];
        if (!same || spec_.rates[std::size_t(rate)].size != 1) return false;
    }
    for (std::size_t i = 0; i < f.of[p].gradients.size(); ++i)
        if (spec_.params[p].rates[std::size_t(f.of[p].gradients[i])] !=
            spec_.params[p - 1].rates[std::size_t(f.of[p - 1].gradients[i])])
            return false;
    return true;
}

// Static facts of the reverse sweep: what depends on parameters, and who is first to write a sum.
void Layout::find_flags() {
    std::size_t buffers = spec_.features.size();
    std::vector<bool> needs_grad(buffers, spec_.input_gradients), written(buffers);
    std::vector<bool> parameter_written(params_.size());
    has_tangent_.assign(buffers, false);
    find_dependence(has_tangent_, needs_grad);
    const std::vector<bool> reaches = find_reach();
    auto first_write = [](std::vector<bool>& seen, int index) {
        bool first = index >= 0 && !seen[index];
        if (index >= 0) seen[index] = true;
        return first;
    };
    for (auto op = ops_.rbegin(); op != ops_.rend(); ++op) {
        flags_.push_back(std::make_unique<bool[]>(3 * op->n_in));
        bool* flags = flags_.back().get();
        const bool back = reaches[op->out];  // else no delta comes back to it, and it writes none
        for (int j = 0; j < op->n_in; ++j) {
            flags[j] = back && first_write(written, op->in[j]);
            flags[op->n_in + j] = needs_grad[op->in[j]];
            flags[2 * op->n_in + j] = has_tangent_[op->in[j]];
        }
        op->delta_first = flags;
        op->needs_grad = flags + op->n_in;
        op->has_tangent = flags + 2 * op->n_in;
        op->out_has_tangent = has_tangent_[op->out];
        op->out_needs_grad = needs_grad[op->out] && back;
        op->w_first = back && first_write(parameter_written, op->w);
        op->b_first = back && first_write(parameter_written, op->b);
    }
    view_.has_tangent = has_tangent_[spec_.out];
}

// Steady operations run in the first inner step only. Sample tiles pass by before the next step could read them.
void Layout::find_steady() {
    view_.steady = tiled() || !view_.has_tangent ? 0 : spec_.steady;
    view_.n_hvps = hvps_;
    bool repeats = false;
    for (Instr& in : spec_.code) {
        if (in.code != Code::forward || in.batch != 0) continue;
        in.repeats = repeats;
        repeats = true;
    }
}

// Where every inner step has samples of its own, a tape that several steps use has a view for each of them, and an
// instruction names the view. The first of a tape has its number, by which low-rank terms know it: they have one step.
void Layout::find_sets() {
    const std::size_t tapes = spec_.tapes.size();
    sets_.clear();
    for (std::size_t t = 0; t < tapes; ++t) sets_.emplace_back(int(t), -1);
    std::vector<int> current(tapes);
    for (Instr& in : spec_.code) {
        if (in.tape < 0 || spec_.sets == 1 || spec_.tapes[std::size_t(in.tape)] != 0) continue;
        const auto tape = std::size_t(in.tape);
        if (in.code == Code::forward) {
            if (sets_[tape].second < 0) sets_[tape].second = in.draws;
            const std::pair<int, int> wanted{in.tape, in.draws};
            current[tape] = int(std::find(sets_.begin(), sets_.end(), wanted) - sets_.begin());
            if (current[tape] == int(sets_.size())) sets_.push_back(wanted);
        }
        in.tape = current[tape];
    }
}

// Per buffer: whether the output depends on it. What the network returns need not: a loss may go another way.
std::vector<bool> Layout::find_reach() const {
    std::vector<bool> reaches(spec_.features.size());
    reaches[std::size_t(spec_.out)] = true;
    for (auto op = ops_.rbegin(); op != ops_.rend(); ++op)
        for (int j = 0; j < op->n_in; ++j)
            if (reaches[std::size_t(op->out)]) reaches[std::size_t(op->in[j])] = true;
    return reaches;
}

// Per buffer: whether it depends on a parameter that adapts, and on anything whose gradient is wanted.
void Layout::find_dependence(std::vector<bool>& has_tangent, std::vector<bool>& needs_grad) const {
    for (const Op& op : ops_) {
        for (int p : {op.w, op.b}) {
            if (p < 0) continue;
            has_tangent[op.out] = has_tangent[op.out] || (spec_.params[p].adapts && spec_.params[p].active);
            needs_grad[op.out] = needs_grad[op.out] || spec_.params[p].active;
        }
        for (int j = 0; j < op.n_in; ++j) {
            has_tangent[op.out] = has_tangent[op.out] || has_tangent[op.in[j]];
            needs_grad[op.out] = needs_grad[op.out] || needs_grad[op.in[j]];
        }
    }
}

// What operations of families point to; of pointwise ones only the steps that the wanted deltas need.
void Layout::add_families() {
    for (std::size_t i = 0; i < ops_.size(); ++i) {
        const OpSpec& s = spec_.ops[i];
        if (s.kind == OpKind::pointwise) {
            pointwise_.push_back(std::make_unique<PointwiseTables>(s, spec_.features, ops_[i].needs_grad));
            ops_[i].pointwise = &pointwise_.back()->view();
        } else if (s.kind == OpKind::linear_map) {
            maps_.push_back(std::make_unique<LinearMapTables>(s, spec_.features));
            ops_[i].map = &maps_.back()->view();
        }
    }
    once_ = std::make_unique<bool[]>(spec_.once.size());
    std::copy(spec_.once.begin(), spec_.once.end(), once_.get());
}

// Convolutions whose norm follows at once: the two work through the samples together, while they are in cache.
void Layout::find_pairs() {
    for (std::size_t i = 1; i < ops_.size(); ++i) {
        Op &conv = ops_[i - 1], &norm = ops_[i];
        bool normed = norm.kind == OpKind::batch_norm || norm.kind == OpKind::running_norm;
        if (conv.kind != OpKind::conv || !normed || norm.in[0] != conv.out || conv.out == spec_.out) continue;
        if (norm.width != conv.out_width) continue;
        long readers = std::count_if(ops_.begin(), ops_.end(),
                                     [&](const Op& op) { return std::count(op.in, op.in + op.n_in, conv.out) > 0; });
        norm.behind_conv = readers == 1 && int(i) != view_.steady;
        conv.bias_cancels = readers == 1 && norm.kind == OpKind::batch_norm;
    }
}

}  // namespace maml_fast
