// Part of Engine: linear layers, whose adapted weights may stay factored.

// Where a parameter's gradient g goes: to ← from + scale · g, or g alone where from is absent.
struct Destination {
    PerTask<S> to;
    PerTask<const S> from;
    S scale;
};

Destination added(PerTask<S> to, bool first, S scale = S(1)) const {
    return {to, first ? PerTask<const S>{} : PerTask<const S>{to.p, to.stride}, scale};
}

// The weight: a parameter, or the second input.
PerTask<const S> matrix(const Op& op, int slot, const TapeView& tape) const {
    if (op.n_in == 1) return weight(slot, op.w);
    return {value(tape, op.in[1]), plan_.features[op.in[1]]};
}

// The weight's direction in a Hessian-vector product; absent where it has none.
PerTask<const S> matrix_direction(const Op& op, int slot) const {
    if (op.n_in == 1) return direction(slot, op.w);
    return {tangent(op, 1), plan_.features[op.in[1]]};
}

// Where the gradient of a weight goes that is the second input; delta(j) is the j-th input's.
template <class F>
Destination matrix_delta(const Op& op, F delta) const {
    return added({delta(1), plan_.features[op.in[1]]}, op.delta_first[1]);
}

void linear_values(const Op& op, const Instr& in, const TapeView& tape, const S* x, S* y) {
    const long N = samples(tape);
    PerTask<const S> bias = weight(in.theta, op.b);
    bool spread_bias = op.low_rank && bias.stride != 0;
    if (spread_bias) spread(N * op.rows, op.out_width, bias, y);
    linear_product(op, N, {x, matrix(op, in.theta, tape)}, {}, spread_bias ? PerTask<const S>{} : bias, spread_bias, y);
    if (op.low_rank) add_product(op, in.theta_terms, N, x, y);
}

// ---- low-rank weights: W = W_0 + Σ_r c_r P_rᵀ Q_r -----------------------------------------

const S* deltas(const Op& op, const LowRankTerm& f) const {
    if (f.origin == Origin::tangent_delta) return ws_ + plan_.tangents[f.hvp].delta[op.out];
    return ws_ + view(f.tape).delta[op.out];
}
const S* inputs(const Op& op, const LowRankTerm& f) const {
    if (f.origin == Origin::tangent_input) return ws_ + plan_.tangents[f.hvp].value[op.in[0]];
    return value(view(f.tape), op.in[0]);
}
// A layer without a tangent at its input has no such term.
bool absent(const Op& op, const LowRankTerm& f) const {
    return f.origin == Origin::tangent_input && !op.has_tangent[0];
}

S coefficient(const Op& op, const LowRankTerm& f) const {
    return S(f.sign) * (f.rates >= 0 ? *rate(plan_.params[op.w], f.rates) : S(1));
}

// y += x (Σ_r c_r P_rᵀ Q_r)ᵀ = Σ_r c_r (x Q_rᵀ) P_r.
void add_product(const Op& op, LowRankTerms terms, long N, const S* x, S* y) {
    for (int r = 0; r < terms.n; ++r) {
        const LowRankTerm& f = terms.p[r];
        if (absent(op, f)) continue;
        add_term(op, f, N, op.width, op.out_width, x, inputs(op, f), deltas(op, f), true, y);
    }
}

// dx += dy (Σ_r c_r P_rᵀ Q_r) = Σ_r c_r (dy P_rᵀ) Q_r.
void add_transposed_product(const Op& op, LowRankTerms terms, long N, const S* dy, S* dx) {
    for (int r = 0; r < terms.n; ++r) {
        const LowRankTerm& f = terms.p[r];
        if (absent(op, f)) continue;
        bool owned = view(f.tape).value[op.in[0]] >= 0;
        add_term(op, f, N, op.out_width, op.width, dy, deltas(op, f), inputs(op, f), owned, dx);
    }
}

// y += c (x qᵀ) p for every task. `owned`: p lies in the workspace.
void add_term(const Op& op, const LowRankTerm& f, long N, long I, long O, const S* x, const S* q, const S* p,
              bool owned, S* y) {
    long rows = N * op.rows, rank = samples(view(f.tape)) * op.rows;
    S c = coefficient(op, f);
    for (long b = 0; b < B_; ++b)
        low_rank_product<S>(rows, I, O, rank, c, x + b * rows * I, q + b * rank * I, p + b * rank * O, owned,
                            y + b * rows * O, scratch(), gemm_scratch());
}

// Σ_tasks P_rᵀ Q_r into the sum: products over the rows of all tasks of the block, two at a time.
void accumulate_low_rank(const Op& op, LowRankTerms terms) {
    S *sum = partial_ + plan_.params[op.w].sum, *free = scratch();
    const Result<S> to{sum, op.width, sum, nullptr};
    Outer<S> waiting;
    for (int r = 0; r < terms.n; ++r) {
        const LowRankTerm& f = terms.p[r];
        if (absent(op, f)) continue;
        Outer<S> next{B_ * samples(view(f.tape)) * op.rows, deltas(op, f), inputs(op, f)};
        if (f.sign < 0) {
            const S* p = next.dy;
            long size = next.rows * op.out_width;
            put(true, free, size, [=](long i) { return -p[i]; });
            next.dy = free;
            free += size;
        }
        if (waiting.rows == 0) {
            waiting = next;
            continue;
        }
        WeightGradient<S>{waiting, next, to}(op, gemm_scratch());
        waiting = {};
        free = scratch();
    }
    if (waiting.rows > 0) WeightGradient<S>{waiting, {}, to}(op, gemm_scratch());
}

// ---- products with weights, shared or a task's own ---------------------------------------------

// Rows of a block's tasks and the weights that multiply them; absent where x is null.
struct Operand {
    const S* x = nullptr;
    PerTask<const S> w{};
};

// Where a task's own weights are in panels: for all its sample tiles, or for one product.
S* own_panels(const Op& op, int place) const {
    return (op.own_panels < 0 ? scratch() : ws_ + op.own_panels) + place * panels_size(op, lanes<S>);
}

// Wᵀ for task b. What all tasks share was packed before the call began, unless it is thin.
Right<S> transposed_weight(const Op& op, const PerTask<const S>& w, long b, int place) const {
    if (is_thin(op)) return {w.of(b), op.out_width, false, false};
    if (w.stride == 0) return {arena_ + op.pack_forward, op.width, true, true};
    S* panels = own_panels(op, place);
    if (sample_tile_ == 0) pack_transposed(op.width, op.out_width, w.of(b), panels);
    return {panels, op.width, true, true};
}

// W for task b; in place where it is read once.
Right<S> plain_weight(const Op& op, const PerTask<const S>& w, long b, int place) const {
    if (w.stride == 0) return {arena_ + op.pack_backward, op.out_width, true, true};
    if (op.own_panels < 0) return {w.of(b), op.width, false, false};
    S* panels = own_panels(op, kProducts + place);
    if (sample_tile_ == 0) pack(op.out_width, op.width, w.of(b), op.width, panels);
    return {panels, op.out_width, true, true};
}

// y (+)= x Wᵀ + z Vᵀ + bias; W may be shared, V is every task's own.
void linear_product(const Op& op, long N, const Operand& x, const Operand& z, PerTask<const S> bias, bool add, S* y) {
    multiply(N * op.rows, op.out_width, x, z, bias, add, y, [&](const Operand& o, long b, int place) {
        return forward_term(op, o.x + b * N * op.rows * op.width, transposed_weight(op, o.w, b, place));
    });
}

// dx (+)= dy W + dz V.
void linear_transposed_product(const Op& op, long N, const Operand& dy, const Operand& dz, bool add, S* dx) {
    multiply(N * op.rows, op.width, dy, dz, {}, add, dx, [&](const Operand& o, long b, int place) {
        return backward_term(op, o.x + b * N * op.rows * op.out_width, plain_weight(op, o.w, b, place));
    });
}

// y (+)= p's and q's products + bias for `rows` rows per task; term(p, b, place) is one task's product.
template <class F>
void multiply(long rows, long width, const Operand& p, const Operand& q, PerTask<const S> bias, bool add, S* y,
              F term) const {
    constexpr long kFewRows = kTileRows / 2;  // too few to fill a tile: all tasks' rows together do better
    if (q.x && p.w.stride == 0 && rows < kFewRows) {
        multiply(rows, width, q, {}, bias, add, y, term);
        return multiply(rows, width, p, {}, {}, true, y, term);
    }
    bool together = !q.x && p.w.stride == 0 && bias.stride == 0;
    long n = together ? 1 : B_, M = together ? B_ * rows : rows;
    for (long b = 0; b < n; ++b, y += M * width)
        gemm<S>(M, width, term(p, b, 0), q.x ? term(q, b, 1) : Product<S>{}, {y, width, add ? y : nullptr, bias.of(b)},
                gemm_scratch());
}

// Of a backward pass: the gradient's slot, or the parameter after the step.
Destination gradient_or_step(const Instr& in, int param, bool adapted_only, bool first) const {
    if (in.step < 0) return added(gradient(in.out, param, adapted_only), starts(first));
    PerTask<S> to = gradient(in.step, param, adapted_only);
    S scale = to ? -*rate(plan_.params[param], in.rates) : S(1);
    return sample_tile_ == 0 ? Destination{to, weight(in.theta, param), scale} : added(to, false, scale);
}

// Of a Hessian-vector product.
Destination curvature(const Instr& in, int param, bool first) const {
    if (!in.in_place) return added(gradient(in.out, param, false), starts(first));
    if (param < 0 || plan_.params[param].sum < 0) return {};
    const Param& p = plan_.params[param];
    PerTask<S> to = in.out == kSums ? PerTask<S>{partial_ + p.sum, 0} : gradient(in.out, param, false);
    return added(to, false, -product_factor(in));
}

// The gradients dyᵀ x + dzᵀ z and Σ dy; the second product is absent where z is null.
void linear_gradients(const Op& op, long N, const S* dy, const S* x, const S* dz, const S* z, const Destination& w,
                      const Destination& bias) {
    // what is only summed over tasks is one product over the rows of all of them
    bool together = (w.to || bias.to) && (!w.to || w.to.stride == 0) && (!bias.to || bias.to.stride == 0);
    long n = together ? 1 : B_, rows = N * op.rows * (together ? B_ : 1);
    for (long b = 0; b < n; ++b) {
        long in = b * rows * op.width, out = b * rows * op.out_width;
        if (w.to) {
            Outer<S> one{rows, dy + out, x + in}, two = z ? Outer<S>{rows, dz + out, z + in} : Outer<S>{};
            WeightGradient<S>{one, two, {w.to.of(b), op.width, w.from.of(b), nullptr, w.scale}}(op, gemm_scratch());
        }
        if (bias.to) column_sums(rows, op.out_width, dy + out, bias.from.of(b), bias.scale, bias.to.of(b));
    }
}

// delta(j) is where the j-th input's goes, null where none is wanted.
template <class F>
void linear_backward(const Op& op, const Instr& in, const TapeView& tape, const S* dy, S* dx, F delta) {
    long N = samples(tape);
    auto to = [&](int param, bool first) {
        return in.code == Code::hvp ? curvature(in, param, first)
                                    : gradient_or_step(in, param, adapted_only(in), first);
    };
    if (dx) linear_transposed_product(op, N, {dy, matrix(op, in.theta, tape)}, {}, !op.delta_first[0], dx);
    if (dx && op.low_rank) add_transposed_product(op, in.theta_terms, N, dy, dx);
    linear_gradients(op, N, dy, value(tape, op.in[0]), nullptr, nullptr,
                     op.n_in > 1 ? matrix_delta(op, delta) : to(op.w, op.w_first), to(op.b, op.b_first));
}

void linear_tangent(const Op& op, const Instr& in, const TapeView& tape, const S* tx, S* ty) {
    long N = samples(tape);
    PerTask<const S> w = matrix(op, in.theta, tape), v = matrix_direction(op, in.vector),
                     vb = direction(in.vector, op.b);
    const S* x = value(tape, op.in[0]);
    if (op.low_rank || (!tx && !v)) {
        vb ? spread(N * op.rows, op.out_width, vb, ty) : fill(ty, B_ * per_task(tape, op.out), S(0));
        if (tx) linear_product(op, N, {tx, w}, {}, {}, true, ty);
        if (tx && op.low_rank) add_product(op, in.theta_terms, N, tx, ty);
        if (op.low_rank) add_product(op, in.vector_terms, N, x, ty);
    } else if (tx) {
        linear_product(op, N, {tx, w}, v ? Operand{x, v} : Operand{}, vb, false, ty);
    } else {
        linear_product(op, N, {x, v}, {}, vb, false, ty);
    }
}

// Every row of a task ← its bias direction.
void spread(long rows, long width, PerTask<const S> v, S* y) {
    for (long b = 0; b < B_; ++b)
        for (long r = 0; r < rows; ++r) copy(v.of(b), y + (b * rows + r) * width, width);
}

template <class F>
void linear_backward_tangent(const Op& op, const Instr& in, const TapeView& tape, const S* tx, const S* dy, const S* ey,
                             S* ex, F delta) {
    long N = samples(tape);
    PerTask<const S> v = matrix_direction(op, in.vector);
    if (ex) {
        linear_transposed_product(op, N, {ey, matrix(op, in.theta, tape)}, v ? Operand{dy, v} : Operand{},
                                  !op.delta_first[0], ex);
        if (op.low_rank) add_transposed_product(op, in.theta_terms, N, ey, ex);
        if (op.low_rank) add_transposed_product(op, in.vector_terms, N, dy, ex);
    }
    linear_gradients(op, N, ey, value(tape, op.in[0]), dy, tx,
                     op.n_in > 1 ? matrix_delta(op, delta) : curvature(in, op.w, op.w_first),
                     curvature(in, op.b, op.b_first));
}
