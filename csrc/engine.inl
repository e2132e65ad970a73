// Runs a plan's program for a few tasks in lockstep: every instruction for all of them, then the next.
// Included once per instruction set, inside that file's own unnamed namespace: nothing here may be a
// symbol that another instruction set could link against.

// clang-format off: in order of dependence
#include "primitives/vector.inl"
#include "primitives/edge.inl"
#include "primitives/transpose.inl"
#include "primitives/tiles.inl"
#include "primitives/gemm.inl"
#include "primitives/gram.inl"
#include "primitives/indirect.inl"
#include "primitives/math.inl"
#include "primitives/reduce.inl"
#include "primitives/philox.inl"
#include "layers/activation.inl"
#include "layers/norm_statistics.inl"
#include "layers/norm_windows.inl"
#include "layers/channel_norm.inl"
#include "layers/channel_norm_tangent.inl"
#include "layers/boxes.inl"
#include "layers/conv.inl"
#include "layers/expression.inl"
#include "layers/layer_norm.inl"
#include "layers/linear.inl"
#include "layers/losses.inl"
#include "layers/pooling.inl"
#include "layers/rearrange.inl"
#include "layers/softmax.inl"
// clang-format on

// A parameter-sized piece of memory for every task of the block; stride 0 where they share it.
template <class S>
struct PerTask {
    S* p = nullptr;
    long stride = 0;
    explicit operator bool() const { return p != nullptr; }
    S* of(long b) const { return p ? p + b * stride : nullptr; }
};

template <class S>
class Engine {
  public:
    Engine(const PlanView& plan, const Call& call, const S* arena, S* workspace, S* partial)
        : plan_(plan), call_(call), arena_(arena), ws_(workspace), partial_(partial) {}

    void run(long first, long count) {
        long rounds = ceil_div(count, plan_.lockstep);
        for (long round = 0; round < rounds; ++round) {
            long begin = round * count / rounds, end = (round + 1) * count / rounds;
            t0_ = first + begin;
            B_ = end - begin;
            for (const Instr* in = plan_.code; in < plan_.code + plan_.n_code; in += in->group_size)
                for (sample_tile_ = 0; sample_tile_ < in->sample_tiles; ++sample_tile_)
                    for (int i = 0; i < in->group_size; ++i) timed(in[i]);
        }
    }

  private:
    void timed(const Instr& in) {
        if (!call_.clock) return execute(in);
        std::int64_t start = call_.clock();
        execute(in);
        call_.spent[&in - plan_.code] += call_.clock() - start;
    }

    void execute(const Instr& in) {
        switch (in.code) {
            case Code::load:
                return load_parameters(in.slot, in.place);
            case Code::forward:
                return forward(in);
            case Code::support_loss:
                return loss(in, 0, nullptr, true);
            case Code::query_loss:
                return loss(in, 1, static_cast<S*>(call_.losses) + t0_, in.seed);
            case Code::cotangent:
                return cotangent(in.tape);
            case Code::backward:
                return backward(in);
            case Code::update:
                return update(in.out, in.theta, in.gradient, in.rates);
            case Code::scale:
                return scale(in.out, in.vector, in.rates);
            case Code::pointwise:
                return slot_function(plan_.functions[in.function]);
            case Code::hvp:
                return hvp(in);
            case Code::add:
                return add(S(1), in.out, in.vector);
            case Code::subtract:
                return add(S(-1), in.out, in.vector);
            case Code::rate_gradient:
                return rate_gradient(in.gradient, in.adjoint, in.rates);
            case Code::accumulate:
                return accumulate(in);
            case Code::store_parameters:
                return store_parameters(in.theta, in.place);
            case Code::store_gradients:
                return store_gradients(in.vector);
            case Code::store_outputs:
                return store_outputs(in.tape);
        }
    }

    // ---- where things are --------------------------------------------------------------------

    const TapeView& view(int tape) const { return plan_.tapes[tape][sample_tile_]; }
    bool starts(bool first_writer) const { return first_writer && sample_tile_ == 0; }

    static long samples(const TapeView& tape) { return tape.samples; }
    long per_task(const TapeView& tape, int buffer) const { return tape.samples * plan_.features[buffer]; }

    // Where the first task's samples begin in the caller's tensors, whose samples have `features` numbers.
    long place(const TapeView& tape, long features) const {
        return (tape.before + t0_ * plan_.samples[tape.batch] + tape.first) * features;
    }

    const S* value(const TapeView& tape, int buffer) const {
        if (tape.value[buffer] >= 0) return ws_ + tape.value[buffer];
        return static_cast<const S*>(call_.x[tape.batch]) + place(tape, plan_.features[buffer]);
    }
    S* output(const TapeView& tape, int buffer) const { return ws_ + tape.value[buffer]; }

    // What an operation without a sample axis sees of a tape: one sample.
    TapeView one_sample(const TapeView& tape) const {
        return {tape.value, tape.delta, tape.aux1, tape.aux2, tape.loss, tape.batch, 0, 1, tape.before};
    }

    S* at(long offset) const { return offset < 0 ? nullptr : ws_ + offset; }

    // θ_k of a parameter: the caller's own in slot 0 or where it does not adapt.
    PerTask<const S> weight(int slot, int param) const {
        if (param < 0) return {nullptr, 0};
        const Param& p = plan_.params[param];
        if (slot == 0 || !p.adapts)
            return {p.packed >= 0 ? arena_ + p.packed : static_cast<const S*>(call_.params[param]), 0};
        return {ws_ + plan_.slots[slot] + p.offset, plan_.parameters};
    }

    // Where the inner loop's direction for a parameter is; absent where it does not adapt.
    PerTask<const S> direction(int slot, int param) const {
        if (param < 0 || !plan_.params[param].adapts) return {nullptr, 0};
        return {ws_ + plan_.slots[slot] + plan_.params[param].offset, plan_.parameters};
    }

    // Where a parameter's gradient goes; absent where none is wanted.
    PerTask<S> gradient(int slot, int param, bool adapted_only) const {
        if (slot < 0 || param < 0) return {nullptr, 0};
        const Param& p = plan_.params[param];
        if (p.offset < 0 || (adapted_only && !p.adapts)) return {nullptr, 0};
        return {ws_ + plan_.slots[slot] + p.offset, plan_.parameters};
    }

    // ---- the network -------------------------------------------------------------------------

    void forward(const Instr& in) {
        const TapeView tape = view(in.tape), one = one_sample(tape);
        for (int i = in.repeats ? plan_.steady : 0; i < plan_.n_ops; ++i) {
            if (pairs_with_norm(i)) {
                ++i;
                conv_norm_forward(plan_.ops[i - 1], plan_.ops[i], i, in.theta, tape);
            } else {
                forward_layer(in, plan_.ops[i].once ? one : tape, i);
            }
        }
    }

    void forward_layer(const Instr& in, const TapeView& tape, int i) {
        const Op& op = plan_.ops[i];
        const S* x = op.n_in ? value(tape, op.in[0]) : nullptr;
        S *y = output(tape, op.out), *aux1 = at(tape.aux1[i]), *aux2 = at(tape.aux2[i]);
        long N = samples(tape), size = per_task(tape, op.out);
        switch (op.kind) {
            case OpKind::linear:
                return linear_values(op, in, tape, x, y);
            case OpKind::activation:
                return activation_forward<S>(op, B_ * size, x, y, aux1, aux2);
            case OpKind::affine:
                return affine_values(op, B_ * size, x, y);
            case OpKind::add:
                return add_values(op, B_ * size, x, value(tape, op.in[1]), y);
            case OpKind::cat:
                return join(op, N, y, [&](int j) { return value(tape, op.in[j]); });
            case OpKind::conv:
                return conv_values(op, in.theta, N, x, y);
            case OpKind::max_pool:
                return max_pool_values(op, N, x, y, aux1);
            case OpKind::layer_norm:
                return layer_norm_values(op, in.theta, N, size, x, y, aux1, aux2);
            case OpKind::batch_norm:
            case OpKind::running_norm:
            case OpKind::group_norm:
                return norm_forward(op, i, in.theta, tape);
            case OpKind::avg_pool:
            case OpKind::transpose:
            case OpKind::pad:
            case OpKind::upsample:
                return linear_map(op, N, x, y);
            case OpKind::parameter:
                return spread_parameter(weight(in.theta, op.w), size, y);
            case OpKind::constant:
                return spread_parameter({constant(tape.batch == 1 && op.c1 >= 0 ? op.c1 : op.c0), 0}, size, y);
            case OpKind::target:
                return given_values(op, tape, target(tape.batch, op.width), y);
            case OpKind::input:
                return given_values(op, tape, call_.inputs[tape.batch][op.width], y);
            case OpKind::draw:
                return draw_values(op, in.draws, tape, y);
            case OpKind::lookup:
                return lookup_values(op, tape, table(op, tape, weight(in.theta, op.w)), true, y);
            case OpKind::check:
                return check_values(op, tape, x, y);
            case OpKind::pointwise:
                return pointwise_forward(op, tape, y);
            case OpKind::linear_map:
                return map_values(op, tape, [&](int j) { return value(tape, op.in[j]); }, y);
            case OpKind::matmul:
                return matmul_forward(op, tape, y);
            case OpKind::softmax:
            case OpKind::log_softmax:
                return each_row(
                    op, tape, [&](long at) { softmax_row(op.kind == OpKind::log_softmax, op.width, x + at, y + at); });
            case OpKind::max:
                return max_over(B_ * N * op.rows, op.width, op.out_width, x, y, aux1);
        }
    }

    // ---- reverse -----------------------------------------------------------------------------

    // The delta of an input; null where it is not wanted.
    S* input_delta(const TapeView& tape, const Op& op, int j, bool inputs) const {
        const int buffer = op.in[j];
        const bool own = tape.value[buffer] >= 0;
        if (!op.needs_grad[j] || (!own && !inputs)) return nullptr;
        if (own || tape.delta[buffer] >= 0) return at(tape.delta[buffer]);
        return static_cast<S*>(call_.dx[tape.batch]) + place(tape, plan_.features[buffer]);
    }

    // Whether a backward pass is for the inner step's gradient, which is that of parameters that adapt.
    static bool adapted_only(const Instr& in) { return in.code == Code::backward && in.batch == 0; }

    void backward(const Instr& in) { pull_back(in, view(in.tape), 0, plan_.n_ops); }

    // The backward pass of operations [first, last).
    void pull_back(const Instr& in, const TapeView& tape, int first, int last) {
        const TapeView one = one_sample(tape);
        for (int i = last - 1; i >= first; --i) {
            const Op& op = plan_.ops[i];
            if (!op.out_needs_grad || (adapted_only(in) && !op.out_has_tangent)) continue;
            S* dx = op.n_in ? input_delta(tape, op, 0, in.inputs) : nullptr;
            if (dx && i > first && pairs_with_norm(i - 1)) {
                const Op& conv = plan_.ops[i - 1];
                conv_norm_backward(conv, op, i, in.theta, tape, in.out, adapted_only(in), dx,
                                   input_delta(tape, conv, 0, in.inputs));
                --i;
            } else {
                backward_layer(in, op.once ? one : tape, i, dx);
            }
        }
    }

    void backward_layer(const Instr& in, const TapeView& tape, int i, S* dx) {
        const Op& op = plan_.ops[i];
        const S* dy = ws_ + tape.delta[op.out];
        long N = samples(tape), size = B_ * per_task(tape, op.out);
        const bool adapted = adapted_only(in), first = op.n_in && op.delta_first[0];
        auto delta = [&](int j) { return input_delta(tape, op, j, in.inputs); };
        switch (op.kind) {
            case OpKind::linear:
                return linear_backward(op, in, tape, dy, dx, delta);
            case OpKind::activation:
                if (dx)
                    activation_backward<S>(op, first, size, value(tape, op.out), ws_ + tape.aux1[i], dy, dx,
                                           at(tape.aux2[i]));
                return;
            case OpKind::affine:
                if (dx) scaled(op.f0, first, size, dy, dx);
                return;
            case OpKind::add:
                return add_deltas(op, size, dy, delta);
            case OpKind::cat:
                return split_all(op, N, dy, delta);
            case OpKind::conv:
                return conv_backward_values(op, in, tape, dy, dx);
            case OpKind::max_pool:
                if (dx) max_pool_deltas(op, first, N, ws_ + tape.aux1[i], dy, dx);
                return;
            case OpKind::layer_norm:
                return layer_norm_deltas(op, i, in.theta, tape, in.out, adapted, dy, dx);
            case OpKind::batch_norm:
            case OpKind::running_norm:
            case OpKind::group_norm:
                return norm_backward(op, i, in.theta, tape, in.out, adapted, dy, dx);
            case OpKind::avg_pool:
            case OpKind::transpose:
            case OpKind::pad:
            case OpKind::upsample:
                if (dx) transposed_linear_map(op, first, N, dy, dx);
                return;
            case OpKind::parameter:
                return add_parameter_gradient(gradient(in.out, op.w, adapted), op.w_first, size / B_, dy);
            case OpKind::constant:
            case OpKind::target:
            case OpKind::draw:
            case OpKind::check:
                return;
            case OpKind::input:
                return in.code == Code::hvp ? subtract_input_delta(op, in, tape, dy) : input_deltas(op, in, tape, dy);
            case OpKind::lookup:
                return lookup_deltas(op, tape, dy, gradient(in.out, op.w, adapted), delta);
            case OpKind::pointwise:
                return pointwise_backward(op, tape, dy, delta);
            case OpKind::linear_map:
                return map_deltas(op, tape, dy, delta);
            case OpKind::matmul:
                return matmul_backward(op, tape, dy, delta);
            case OpKind::softmax:
            case OpKind::log_softmax:
                if (dx)
                    each_row(op, tape, [&](long at) {
                        softmax_backward_row(op.kind == OpKind::log_softmax, first, op.width, value(tape, op.out) + at,
                                             dy + at, dx + at);
                    });
                return;
            case OpKind::max:
                if (dx) max_over_backward(first, B_ * N * op.rows, op.width, op.out_width, ws_ + tape.aux1[i], dy, dx);
                return;
        }
    }

    // ---- Hessian-vector product: the tangent of forward and backward ---------------------------

    void hvp(const Instr& in) {
        const TapeView tape = view(in.tape), one = one_sample(tape);
        if (!plan_.has_tangent) {
            if (!in.in_place) fill(ws_ + plan_.slots[in.out], B_ * plan_.parameters, S(0));
            return;
        }
        tangents_ = plan_.tangents[in.hvp];
        for (int i = plan_.steady; i < plan_.n_ops; ++i) forward_tangent(in, plan_.ops[i].once ? one : tape, i);
        loss_tangent(tape);
        const TapeView back = of_tangents(tape), back_one = one_sample(back);
        for (int i = plan_.n_ops - 1; i >= plan_.steady; --i)
            backward_tangent(in, plan_.ops[i].once ? back_one : back, tape, i);
        if (!gather(in, tape)) return;
        pull_back(in, back, 0, plan_.steady);
        if (!in.inputs) return;
        const S* ex = ws_ + tangents_.delta[0];
        S* dx = static_cast<S*>(call_.dx[0]) + place(tape, plan_.features[0]);
        S alpha = product_factor(in);
        for (long i = 0; i < B_ * per_task(tape, 0); ++i) dx[i] -= alpha * ex[i];
    }

    // A tape whose deltas are the product's.
    TapeView of_tangents(const TapeView& tape) const {
        TapeView t = tape;
        t.delta = tangents_.delta;
        return t;
    }

    // Adds what comes back to steady values, which is linear, to that of the products before; true for the last one,
    // with which all of it goes further back.
    bool gather(const Instr& in, const TapeView& tape) {
        const bool last = in.hvp == plan_.n_hvps - 1;
        for (int v = in.inputs ? 0 : 1; plan_.steady && v < plan_.buffers; ++v) {
            if (plan_.gathered[v] < 0) continue;
            S *sum = ws_ + plan_.gathered[v], *delta = ws_ + tangents_.delta[v], *to = last ? delta : sum;
            const S* from = last ? sum : delta;
            put(!last && in.hvp == 0, to, B_ * held(tape, v) * plan_.features[v], [=](long i) { return from[i]; });
        }
        if (!last && !in.in_place) clear_steady_gradients(in);
        return last || plan_.steady == 0;
    }

    void clear_steady_gradients(const Instr& in) {
        auto clear = [&](int param, bool first) {
            PerTask<S> to = gradient(in.out, param, false);
            for (long b = 0; first && to && b < B_; ++b) fill(to.of(b), plan_.params[param].size, S(0));
        };
        for (const Op* op = plan_.ops; op < plan_.ops + plan_.steady; ++op) {
            clear(op->w, op->w_first);
            clear(op->b, op->b_first);
        }
    }

    S* tangent(const Op& op, int j) const { return op.has_tangent[j] ? ws_ + tangents_.value[op.in[j]] : nullptr; }

    void forward_tangent(const Instr& in, const TapeView& tape, int i) {
        const Op& op = plan_.ops[i];
        if (!op.out_has_tangent) return;
        S* ty = ws_ + tangents_.value[op.out];
        const S* tx = op.n_in ? tangent(op, 0) : nullptr;
        long N = samples(tape), size = B_ * per_task(tape, op.out);
        switch (op.kind) {
            case OpKind::linear:
                return linear_tangent(op, in, tape, tx, ty);
            case OpKind::activation:
                return activation_tangent<S>(size, ws_ + tape.aux1[i], tx, ty);
            case OpKind::affine:
                return scaled(op.f0, true, size, tx, ty);
            case OpKind::add:
                return add_tangents(op, size, tx, tangent(op, 1), ty);
            case OpKind::cat:
                return join(op, N, ty, [&](int j) { return tangent(op, j); });
            case OpKind::conv:
                return conv_tangent(op, in, tape, tx, ty);
            case OpKind::max_pool:
                return max_pool_tangents(op, N, ws_ + tape.aux1[i], tx, ty);
            case OpKind::layer_norm:
                return layer_norm_tangents(op, i, in.theta, in.vector, tape, tx, ty);
            case OpKind::batch_norm:
            case OpKind::running_norm:
            case OpKind::group_norm:
                return norm_tangent(op, i, in.theta, in.vector, tape, ty);
            case OpKind::avg_pool:
            case OpKind::transpose:
            case OpKind::pad:
            case OpKind::upsample:
                return linear_map(op, N, tx, ty);
            case OpKind::parameter:
                return spread_parameter(direction(in.vector, op.w), size / B_, ty);
            case OpKind::constant:
            case OpKind::target:
            case OpKind::input:
            case OpKind::draw:
            case OpKind::check:
                return;
            case OpKind::lookup:
                return lookup_values(op, tape, table_tangent(op, in.vector), false, ty);
            case OpKind::pointwise:
                return pointwise_tangent(op, tape, ty);
            case OpKind::linear_map:
                return map_values(op, tape, [&](int j) { return tangent(op, j); }, ty);
            case OpKind::matmul:
                return matmul_tangent(op, tape, ty);
            case OpKind::softmax:
            case OpKind::log_softmax:
                return each_row(op, tape, [&](long at) {
                    softmax_tangent_row(op.kind == OpKind::log_softmax, op.width, value(tape, op.out) + at, tx + at,
                                        ty + at);
                });
            case OpKind::max:
                return max_over_tangent(B_ * N * op.rows, op.width, op.out_width, ws_ + tape.aux1[i], tx, ty);
        }
    }

    // `back` has the product's deltas, `tape` those of the backward pass. What has no tangent is pulled back as there.
    void backward_tangent(const Instr& in, const TapeView& back, const TapeView& whole, int i) {
        const Op& op = plan_.ops[i];
        if (!op.out_needs_grad) return;
        auto delta = [&](int j) { return input_delta(back, op, j, in.inputs); };
        S* ex = op.n_in ? delta(0) : nullptr;
        if (!op.out_has_tangent) return backward_layer(in, back, i, ex);
        const TapeView tape = op.once ? one_sample(whole) : whole;
        const S *dy = ws_ + tape.delta[op.out], *ey = ws_ + tangents_.delta[op.out],
                *tx = op.n_in ? tangent(op, 0) : nullptr;
        long N = samples(tape), size = B_ * per_task(tape, op.out);
        bool first = op.n_in && op.delta_first[0];
        switch (op.kind) {
            case OpKind::linear:
                return linear_backward_tangent(op, in, tape, tx, dy, ey, ex, delta);
            case OpKind::activation:
                if (ex)
                    activation_backward_tangent<S>(op.act, first, size, ws_ + tape.aux1[i], at(tape.aux2[i]), tx, ey,
                                                   ex);
                return;
            case OpKind::affine:
                if (ex) scaled(op.f0, first, size, ey, ex);
                return;
            case OpKind::add:
                return add_deltas(op, size, ey, delta);
            case OpKind::cat:
                return split_all(op, N, ey, delta);
            case OpKind::conv:
                return conv_backward_tangent(op, in, tape, tx, dy, ey, ex);
            case OpKind::max_pool:
                if (ex) max_pool_deltas(op, first, N, ws_ + tape.aux1[i], ey, ex);
                return;
            case OpKind::layer_norm:
                return layer_norm_tangent_deltas(op, i, in.theta, in.vector, tape, in.out, dy, ey, ex);
            case OpKind::batch_norm:
            case OpKind::running_norm:
            case OpKind::group_norm:
                return norm_backward_tangent(op, i, in.theta, in.vector, tape, in.out, dy, ey, ex);
            case OpKind::avg_pool:
            case OpKind::transpose:
            case OpKind::pad:
            case OpKind::upsample:
                if (ex) transposed_linear_map(op, first, N, ey, ex);
                return;
            case OpKind::parameter:
                return add_parameter_gradient(gradient(in.out, op.w, false), op.w_first, size / B_, ey);
            case OpKind::constant:
            case OpKind::target:
            case OpKind::draw:
            case OpKind::check:
                return;
            case OpKind::input:
                return subtract_input_delta(op, in, tape, ey);
            case OpKind::lookup:
                return lookup_deltas(op, tape, ey, gradient(in.out, op.w, false), delta);
            case OpKind::pointwise:
                return pointwise_backward_tangent(op, tape, dy, ey, delta);
            case OpKind::linear_map:
                return map_deltas(op, tape, ey, delta);
            case OpKind::matmul:
                return matmul_backward_tangent(op, tape, dy, ey, delta);
            case OpKind::softmax:
            case OpKind::log_softmax:
                if (ex)
                    each_row(op, tape, [&](long at) {
                        const S* ty = op.out_has_tangent ? ws_ + tangents_.value[op.out] + at : nullptr;
                        softmax_backward_tangent_row(op.kind == OpKind::log_softmax, first, op.width,
                                                     value(tape, op.out) + at, ty, dy + at, ey + at, ex + at);
                    });
                return;
            case OpKind::max:
                if (ex) max_over_backward(first, B_ * N * op.rows, op.width, op.out_width, ws_ + tape.aux1[i], ey, ex);
                return;
        }
    }

    const S* constant(int c) const { return static_cast<const S*>(call_.constants[c]); }
    S* scratch() const { return ws_ + plan_.scratch; }
    S* norm_scratch() const { return ws_ + plan_.norm_scratch; }
    S* gemm_scratch() const { return ws_ + plan_.gemm_scratch; }

    // clang-format off: inside the class
#include "engine/sharing.inl"
#include "engine/dense.inl"
#include "engine/convolutions.inl"
#include "engine/norms.inl"
#include "engine/layer_norms.inl"
#include "engine/families.inl"
#include "engine/lookups.inl"
#include "engine/linear_maps.inl"
#include "engine/sums.inl"
#include "engine/losses.inl"
#include "engine/vectors.inl"
#include "engine/slot_functions.inl"
    // clang-format on

    const PlanView& plan_;
    const Call& call_;
    const S* arena_;
    S* ws_;
    S* partial_;
    long t0_ = 0, B_ = 0;
    int sample_tile_ = 0;
    TangentView tangents_{};  // of the Hessian-vector product under way
};

template <class S>
void pack_op(const PlanView& plan, const Call& call, int index, S* arena) {
    const Op& op = plan.ops[index];
    if ((op.kind != OpKind::linear && op.kind != OpKind::conv) || op.w < 0) return;
    const S* w = static_cast<const S*>(call.params[op.w]);
    if (op.kind == OpKind::linear) {
        if (op.pack_forward >= 0) pack_transposed(op.width, op.out_width, w, arena + op.pack_forward);
        if (op.pack_backward >= 0) pack(op.out_width, op.width, w, op.width, arena + op.pack_backward);
        return;
    }
    const Param& p = plan.params[op.w];
    if (op.pack_backward >= 0) {
        const long taps = op.conv->kernel();
        conv_weights_flipped(p.o, p.c, taps, p.taps / taps, w, arena + op.pack_backward);
    }
    if (!op.packs) return;
    conv_weights_inward(p.o, p.c, p.taps, w, arena + p.packed);
    for (int set = 0; set < plan.rate_sets; ++set)
        if (const RateOf& r = p.rates[set]; r.packed >= 0)
            conv_weights_inward(p.o, p.c, p.taps, static_cast<const S*>(call.rates[r.index]), arena + r.packed);
}

template <class S>
void run_block(const PlanView& plan, const Call& call, const S* arena, S* workspace, S* partial, long first,
               long count) {
    Engine<S>(plan, call, arena, workspace, partial).run(first, count);
}

template <class S>
constexpr KernelsOf<S> kernels_of() {
    return {lanes<S>, kBlockDepth, pack_op<S>, run_block<S>, draw_run<S>};
}
