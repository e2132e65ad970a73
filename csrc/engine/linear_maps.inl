// Part of Engine: layers that rearrange or average values. They are linear, so their tangents are themselves.

void linear_map(const Op& op, long N, const S* x, S* y) const {
    if (op.kind == OpKind::transpose) return transpose_samples(true, B_ * N, op.rows, op.width, x, y);
    each_samples(B_ * N, [=, &op](long first, long last) {
        if (op.kind == OpKind::pad) pad_forward(op.window, op.width, first, last, x, y);
        if (op.kind == OpKind::upsample) upsample_forward(op.window, op.width, first, last, x, y);
        if (op.kind == OpKind::avg_pool) avg_pool_forward(op.window, op.f0 != 0, op.width, first, last, x, y);
    });
}

void transposed_linear_map(const Op& op, bool first_writer, long N, const S* dy, S* dx) const {
    if (op.kind == OpKind::transpose) return transpose_samples(first_writer, B_ * N, op.width, op.rows, dy, dx);
    long size = plan_.features[op.in[0]];
    each_samples(B_ * N, [=, &op](long first, long last) {
        if (op.kind == OpKind::pad) return pad_backward(op.window, op.width, first_writer, first, last, dy, dx);
        if (first_writer) fill(dx + first * size, (last - first) * size, S(0));
        if (op.kind == OpKind::upsample) upsample_backward(op.window, op.width, first, last, dy, dx);
        if (op.kind == OpKind::avg_pool) avg_pool_backward(op.window, op.f0 != 0, op.width, first, last, dy, dx);
    });
}

void max_pool_values(const Op& op, long N, const S* x, S* y, S* where) const {
    each_samples(B_ * N,
                 [=, &op](long first, long last) { max_pool_forward(op.window, op.width, first, last, x, y, where); });
}

// Where the maxima are, a max-pool is linear.
void max_pool_tangents(const Op& op, long N, const S* where, const S* tx, S* ty) const {
    each_samples(
        B_ * N, [=, &op](long first, long last) { max_pool_tangent(op.window, op.width, first, last, where, tx, ty); });
}

void max_pool_deltas(const Op& op, bool first_writer, long N, const S* where, const S* dy, S* dx) const {
    long size = plan_.features[op.in[0]];
    each_samples(B_ * N, [=, &op](long first, long last) {
        if (first_writer) fill(dx + first * size, (last - first) * size, S(0));
        max_pool_backward(op.window, op.width, first, last, where, dy, dx);
    });
}

// Concatenates the inputs' runs of features, `op.rows` runs per sample; input(j) may be null, for zeros.
template <class F>
void join(const Op& op, long N, S* y, F input) {
    long runs = B_ * N * op.rows, stride = plan_.features[op.out] / op.rows, offset = 0;
    for (int j = 0; j < op.n_in; ++j) {
        long run = plan_.features[op.in[j]] / op.rows;
        const S* x = input(j);
        for (long r = 0; r < runs; ++r) {
            if (x)
                copy(x + r * run, y + r * stride + offset, run);
            else
                fill(y + r * stride + offset, run, S(0));
        }
        offset += run;
    }
}

// The transpose of `join` for input j.
void split(const Op& op, int j, bool first, long N, const S* dy, S* dx) {
    long runs = B_ * N * op.rows, stride = plan_.features[op.out] / op.rows, offset = 0;
    for (int i = 0; i < j; ++i) offset += plan_.features[op.in[i]] / op.rows;
    long run = plan_.features[op.in[j]] / op.rows;
    for (long r = 0; r < runs; ++r) {
        const S* from = dy + r * stride + offset;
        put(first, dx + r * run, run, [=](long i) { return from[i]; });
    }
}

// The same for all inputs; delta(j) is where the j-th one's goes, null where none is wanted.
template <class F>
void split_all(const Op& op, long N, const S* dy, F delta) {
    for (int j = 0; j < op.n_in; ++j)
        if (S* dj = delta(j)) split(op, j, op.delta_first[j], N, dy, dj);
}
