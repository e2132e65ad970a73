// Part of Engine: what a task is given or draws, and rows of tables.

const void* target(int batch, long number) const {
    return number == 0 ? call_.y[batch] : call_.targets[batch][number - 1];
}

// Targets or inputs as values of every sample.
void given_values(const Op& op, const TapeView& tape, const void* given, S* y) const {
    const long size = B_ * per_task(tape, op.out), at = place(tape, plan_.features[op.out]);
    if (op.f0 == 0) return copy(static_cast<const S*>(given) + at, y, size);
    const std::int64_t* whole = static_cast<const std::int64_t*>(given) + at;
    for (long i = 0; i < size; ++i) y[i] = S(whole[i]);
}

// Where the gradient of an input beside buffer 0 goes; null where it is not wanted.
S* input_gradient(const Op& op, const Instr& in, const TapeView& tape) const {
    S* to = in.inputs ? static_cast<S*>(call_.dinputs[tape.batch][op.width]) : nullptr;
    return to ? to + place(tape, plan_.features[op.out]) : nullptr;
}

void input_deltas(const Op& op, const Instr& in, const TapeView& tape, const S* dy) const {
    if (S* to = input_gradient(op, in, tape)) copy(dy, to, B_ * per_task(tape, op.out));
}

void subtract_input_delta(const Op& op, const Instr& in, const TapeView& tape, const S* ey) const {
    S* to = input_gradient(op, in, tape);
    const S alpha = product_factor(in);
    for (long i = 0; to && i < B_ * per_task(tape, op.out); ++i) to[i] -= alpha * ey[i];
}

// Random numbers in [0, 1). PyTorch sees axes (outer, samples, inner) and numbers the elements in this order.
void draw_values(const Op& op, int pass, const TapeView& tape, S* y) const {
    const long N = op.once ? 1 : samples(tape), all = op.once ? 1 : plan_.samples[tape.batch];
    const long features = plan_.features[op.out], inner = features / op.rows, first = op.once ? 0 : tape.first;
    for (long b = 0; b < B_; ++b)
        for (long outer = 0; outer < op.rows; ++outer) {
            const Draw d{std::uint32_t(op.width), std::uint32_t(pass), std::uint32_t(t0_ + b), call_.seed};
            if (op.rows == 1) {
                draw_run(d, first * inner, N * inner, y + b * N * features);
                continue;
            }
            for (long n = 0; n < N; ++n)
                draw_run(d, (outer * all + first + n) * inner, inner, y + (b * N + n) * features + outer * inner);
        }
}

// Whether all elements of a mask are set, for every sample; where they are not, it is reported.
void check_values(const Op& op, const TapeView& tape, const S* x, S* y) const {
    const long rows = B_ * held(tape, op.out), width = plan_.features[op.in[0]];
    for (long r = 0; r < rows; ++r) {
        S all = S(1);
        for (long i = 0; i < width; ++i) all = x[r * width + i] != S(0) ? all : S(0);
        if (all == S(0)) report_outside(S(0), kUnset);
        y[r] = all;
    }
}

// ---- tables -----------------------------------------------------------------------------------------

// A task's table: a parameter, or a value of the task.
PerTask<const S> table(const Op& op, const TapeView& tape, PerTask<const S> parameter) const {
    if (op.n_in == 1) return parameter;
    return {value(tape, op.in[1]), plan_.features[op.in[1]]};
}

PerTask<const S> table_tangent(const Op& op, int vector) const {
    if (op.n_in == 1) return direction(vector, op.w);
    return {tangent(op, 1), plan_.features[op.in[1]]};
}

// f(task, place of the index, row) for every index whose row has a derivative, or for all. One that is not there is
// reported, and counts as row 0.
template <class F>
void each_index(const Op& op, const TapeView& tape, bool all, F f) const {
    const long count = held(tape, op.in[0]) * op.rows;
    const S* index = value(tape, op.in[0]);
    for (long b = 0; b < B_; ++b)
        for (long i = 0; i < count; ++i) {
            const S given = index[b * count + i];
            const bool inside = given >= S(0) && given < S(op.width);
            const long row = inside ? long(given) : 0;
            if (!inside) report_outside(given, op.width);
            if (all || row != long(op.f0)) f(b, b * count + i, row);
        }
}

void report_outside(S row, long rows) const {
    const S most = S(0x1p62), told = row < -most ? -most : row > most ? most : row;
    __atomic_store_n(call_.outside, std::int64_t(told), __ATOMIC_RELAXED);
    __atomic_store_n(call_.outside + 1, std::int64_t(rows), __ATOMIC_RELAXED);
}

// y = rows of a table at the indices. As tangents (`all` false), zeros where a row has no derivative.
void lookup_values(const Op& op, const TapeView& tape, PerTask<const S> from, bool all, S* y) const {
    const long width = op.out_width;
    if (!all) fill(y, B_ * held(tape, op.out) * plan_.features[op.out], S(0));
    if (!from) return;
    each_index(op, tape, all,
               [=](long b, long at, long row) { copy(from.of(b) + row * width, y + at * width, width); });
}

// The table's delta (+)= for every index its δy, at its row.
template <class F>
void lookup_deltas(const Op& op, const TapeView& tape, const S* dy, PerTask<S> parameter, F delta) const {
    const bool own = op.n_in == 2, first = own ? op.delta_first[1] : op.w_first;
    const PerTask<S> to = own ? PerTask<S>{delta(1), plan_.features[op.in[1]]} : parameter;
    const long width = op.out_width;
    if (!to) return;
    for (long b = 0; first && b < B_; ++b) fill(to.of(b), op.width * width, S(0));
    each_index(op, tape, false, [=](long b, long at, long row) {
        S* sum = to.of(b) + row * width;
        const S* d = dy + at * width;
        for (long i = 0; i < width; ++i) sum[i] += d[i];
    });
}
