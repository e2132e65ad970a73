// Part of Engine: linear layers, whose adapted weights may stay factored.

void linear_values(const Op& op, int slot, Factors theta, long N, const S* x, S* y) {
    PerTask<const S> bias = weight(slot, op.b);
    bool spread_bias = op.low_rank && bias.stride != 0;
    if (spread_bias) spread(N * op.rows, op.out_width, bias, y);
    linear_product(op, weight(slot, op.w), N, x, spread_bias ? PerTask<const S>{nullptr, 0} : bias, spread_bias, y);
    if (op.low_rank) add_product(op, theta, N, x, y);
}

// ---- low-rank weights: W = W_0 + Σ_r c_r P_rᵀ Q_r -----------------------------------------

const S* deltas(const Op& op, const Factor& f) const {
    if (f.term == Term::tangent_delta) return ws_ + plan_.tangents[f.hvp].delta[op.out];
    return ws_ + plan_.tapes[f.tape].delta[op.out];
}
const S* inputs(const Op& op, const Factor& f) const {
    if (f.term == Term::tangent_input) return ws_ + plan_.tangents[f.hvp].value[op.in[0]];
    return value(plan_.tapes[f.tape], op.in[0]);
}
// A layer without a tangent at its input has no such term.
bool absent(const Op& op, const Factor& f) const { return f.term == Term::tangent_input && !op.has_tangent[0]; }

S coefficient(const Op& op, const Factor& f) const { return S(f.sign) * (f.rate ? *rate(plan_.params[op.w]) : S(1)); }

// y += x (Σ_r c_r P_rᵀ Q_r)ᵀ = Σ_r c_r (x Q_rᵀ) P_r.
void add_product(const Op& op, Factors factors, long N, const S* x, S* y) {
    for (int r = 0; r < factors.n; ++r) {
        const Factor& f = factors.p[r];
        if (absent(op, f)) continue;
        add_term(op, f, N, op.width, op.out_width, x, inputs(op, f), deltas(op, f), true, y);
    }
}

// dx += dy (Σ_r c_r P_rᵀ Q_r) = Σ_r c_r (dy P_rᵀ) Q_r.
void add_transposed_product(const Op& op, Factors factors, long N, const S* dy, S* dx) {
    for (int r = 0; r < factors.n; ++r) {
        const Factor& f = factors.p[r];
        if (absent(op, f)) continue;
        bool owned = plan_.tapes[f.tape].value[op.in[0]] >= 0;
        add_term(op, f, N, op.out_width, op.width, dy, deltas(op, f), inputs(op, f), owned, dx);
    }
}

// y += c (x qᵀ) p for every task. `owned`: p lies in the workspace.
void add_term(const Op& op, const Factor& f, long N, long I, long O, const S* x, const S* q, const S* p, bool owned,
              S* y) {
    long rows = N * op.rows, rank = samples(plan_.tapes[f.tape]) * op.rows;
    S c = coefficient(op, f);
    for (long b = 0; b < B_; ++b)
        low_rank_product<S>(rows, I, O, rank, c, x + b * rows * I, q + b * rank * I, p + b * rank * O, owned,
                            y + b * rows * O, scratch(), gemm_scratch());
}

// Σ_tasks P_rᵀ Q_r into the sum: one product over the rows of all tasks of the block.
void accumulate_low_rank(const Op& op, Factors factors) {
    S* sum = partial_ + plan_.params[op.w].sum;
    for (int r = 0; r < factors.n; ++r) {
        const Factor& f = factors.p[r];
        if (absent(op, f)) continue;
        long rows = B_ * samples(plan_.tapes[f.tape]) * op.rows;
        const S* p = deltas(op, f);
        if (f.sign < 0) {
            S* negated = scratch();
            put(true, negated, rows * op.out_width, [=](long i) { return -p[i]; });
            p = negated;
        }
        linear_weight_gradient<S>(op, false, rows, p, inputs(op, f), sum, gemm_scratch());
    }
}

// Wᵀ of the weight that all tasks share, packed before the call began.
Right<S> packed_weight(const Op& op) const { return {arena_ + op.pack_forward, op.width, true, true}; }

// Wᵀ of one task's own weight. A single row or column stands in memory as its transpose does.
Right<S> transposed_weight(const Op& op, const S* w) const {
    if (op.width == 1 || op.out_width == 1) return {w, op.out_width, false, false};
    pack_transposed(op.width, op.out_width, w, scratch());
    return {scratch(), op.width, true, true};
}

// y (+)= x Wᵀ + bias, in one product where all tasks share W and bias.
void linear_product(const Op& op, PerTask<const S> w, long N, const S* x, PerTask<const S> bias, bool add, S* y) {
    long rows = N * op.rows;
    if (w.stride == 0 && bias.stride == 0)
        return linear_forward<S>(op, B_ * rows, x, packed_weight(op), bias.p, add, y, gemm_scratch());
    for (long b = 0; b < B_; ++b) {
        Right<S> transposed = w.stride == 0 ? packed_weight(op) : transposed_weight(op, w.of(b));
        linear_forward<S>(op, rows, x + b * rows * op.width, transposed, bias.of(b), add, y + b * rows * op.out_width,
                          gemm_scratch());
    }
}

// dx (+)= dy W.
void linear_transposed_product(const Op& op, PerTask<const S> w, bool first, long N, const S* dy, S* dx) {
    long rows = N * op.rows;
    if (w.stride == 0)
        return linear_backward<S>(op, first, B_ * rows, dy, arena_ + op.pack_backward, true, dx, gemm_scratch());
    for (long b = 0; b < B_; ++b)
        linear_backward<S>(op, first, rows, dy + b * rows * op.out_width, w.of(b), false, dx + b * rows * op.width,
                           gemm_scratch());
}

void linear_gradients(const Op& op, long N, const S* x, const S* dy, PerTask<S> gw, PerTask<S> gb) {
    long rows = N * op.rows;
    for (long b = 0; b < B_; ++b) {
        const S* db = dy + b * rows * op.out_width;
        if (gw) linear_weight_gradient<S>(op, op.w_first, rows, db, x + b * rows * op.width, gw.of(b), gemm_scratch());
        if (gb) column_sums(op.b_first, rows, op.out_width, db, gb.of(b));
    }
}

void linear_tangent(const Op& op, const Instr& in, const TapeView& tape, const S* tx, S* ty) {
    long N = samples(tape);
    PerTask<const S> w = weight(in.a, op.w), v = direction(in.c, op.w), vb = direction(in.c, op.b), none{nullptr, 0};
    if (op.low_rank || (!tx && !v)) {
        vb ? spread(N * op.rows, op.out_width, vb, ty) : fill(ty, B_ * per_task(tape, op.out), S(0));
        if (tx) linear_product(op, w, N, tx, none, true, ty);
        if (tx && op.low_rank) add_product(op, in.theta, N, tx, ty);
        if (op.low_rank) add_product(op, in.vector, N, value(tape, op.in[0]), ty);
        return;
    }
    if (tx) linear_product(op, w, N, tx, vb, false, ty);
    if (v) linear_product(op, v, N, value(tape, op.in[0]), tx ? none : vb, tx != nullptr, ty);
}

// Every row of a task ← its bias direction.
void spread(long rows, long width, PerTask<const S> v, S* y) {
    for (long b = 0; b < B_; ++b)
        for (long r = 0; r < rows; ++r) copy(v.of(b), y + (b * rows + r) * width, width);
}

void linear_backward_tangent(const Op& op, const Instr& in, const TapeView& tape, const S* tx, const S* dy, const S* ey,
                             S* ex) {
    long N = samples(tape), rows = N * op.rows;
    int out = in.d;
    PerTask<const S> v = direction(in.c, op.w);
    if (ex) {
        linear_transposed_product(op, weight(in.a, op.w), op.delta_first[0], N, ey, ex);
        if (v) linear_transposed_product(op, v, false, N, dy, ex);
        if (op.low_rank) add_transposed_product(op, in.theta, N, ey, ex);
        if (op.low_rank) add_transposed_product(op, in.vector, N, dy, ex);
    }
    PerTask<S> hw = gradient(out, op.w, false), hb = gradient(out, op.b, false);
    linear_gradients(op, N, value(tape, op.in[0]), ey, hw, hb);
    if (!hw || !tx) return;
    for (long b = 0; b < B_; ++b)
        linear_weight_gradient<S>(op, false, rows, dy + b * rows * op.out_width, tx + b * rows * op.width, hw.of(b),
                                  gemm_scratch());
}
