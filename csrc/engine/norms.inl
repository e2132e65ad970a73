// Part of Engine: norms over channels, set by set of rows that share statistics.

Norm<S> norm_of(const Op& op, long N) const {
    const Window& g = op.window;
    bool grouped = op.kind == OpKind::group_norm;
    return {op.width, grouped ? op.groups : 0,         grouped ? 1 : N, g.h,     g.w, g.oh, g.ow, g.kh,
            g.kw,     op.kind == OpKind::running_norm, S(op.f0),        S(op.f1)};
}

// Calls f(b, first row of x, first row of y, number of the set, whether it is task b's first) for every set of rows.
template <class F>
void each_set(const Norm<S>& n, long N, F f) const {
    long sets = N / n.samples;
    for (long b = 0; b < B_; ++b)
        for (long s = 0; s < sets; ++s)
            f(b, (b * sets + s) * n.rows(), (b * sets + s) * n.out_rows(), b * sets + s, s == 0);
}

// Row chunks [first, last) of n rows.
template <class F>
void each_rows(long rows, F f) const {
    if (call_.team <= 1) return f(0, rows);
    long chunks = ceil_div(rows, kNormChunk);
    each(chunks, [=](long i) { f(i * kNormChunk, least((i + 1) * kNormChunk, rows)); }, kFewChunks);
}

NormTape<S> norm_tape(const Op& op, int i, const TapeView& tape, const Norm<S>& n, long row, long out_row,
                      long set) const {
    long C = n.C, all = B_ * per_task(tape, op.out);
    const S *stats = ws_ + tape.aux2[i] + set * 2 * C, *maxima = at(tape.aux1[i]);
    return {value(tape, op.in[0]) + row * C, stats, stats + C, maxima ? maxima + out_row * C : nullptr,
            maxima ? maxima + all + out_row * C : nullptr};
}

NormTangents<S> norm_tangents(const Op& op, int i, const Norm<S>& n, long row, long out_row, long set) const {
    long C = n.C;
    const S *stats = ws_ + tangents_.aux2[i] + set * 2 * C, *best = at(tangents_.aux1[i]), *tx = tangent(op, 0);
    return {tx ? tx + row * C : nullptr, stats, stats + C, best ? best + out_row * C : nullptr};
}

void norm_forward(const Op& op, int i, int slot, const TapeView& tape) {
    long N = samples(tape);
    Norm<S> n = norm_of(op, N);
    S* partial = norm_scratch() + kNormArrays * n.C;
    each_set(n, N, [&](long b, long row, long out_row, long set, bool) {
        NormTape<S> t = norm_tape(op, i, tape, n, row, out_row, set);
        norm_values_of(op, slot, n, t, b, output(tape, op.out) + out_row * n.C, [&](S* mean, S* inv) {
            each(ceil_div(n.rows(), kNormChunk), [=](long k) { chunk_moments(n, t.x, k, partial); }, kFewChunks);
            merge_moments(n, partial, mean, inv);
        });
    });
}

// Results of one set of rows of task b; moments(mean, inv) finds its statistics.
template <class F>
void norm_values_of(const Op& op, int slot, const Norm<S>& n, const NormTape<S>& t, long b, S* y, F moments) {
    S *arrays = norm_scratch(), *mean = const_cast<S*>(t.mean), *inv = const_cast<S*>(t.inv);
    if (n.constant)
        running_moments(n, constant(op.c0), constant(op.c1), mean, inv);
    else
        moments(mean, inv);
    norm_parameters<S>(n.C, weight(slot, op.w).of(b), weight(slot, op.b).of(b), nullptr, nullptr, arrays);
    each_rows(n.out_rows(), [=](long first, long last) {
        norm_values(n, arrays, t, first, last, y, const_cast<S*>(t.where), const_cast<S*>(t.best));
    });
}

void norm_backward(const Op& op, int i, int slot, const TapeView& tape, int out, bool adapted_only, const S* dy,
                   S* dx) {
    long N = samples(tape), C = op.width;
    Norm<S> n = norm_of(op, N);
    each_set(n, N, [&](long b, long row, long out_row, long set, bool first_set) {
        NormTape<S> t = norm_tape(op, i, tape, n, row, out_row, set);
        const S* d = dy + out_row * C;
        norm_sums_of(op, slot, n, t, b, out, adapted_only, first_set, d);
        if (!dx) return;
        S* to = dx + row * C;
        bool put_first = op.delta_first[0];
        each_rows(n.rows(), [=](long first, long last) { norm_deltas_of(n, t, put_first, first, last, d, to); });
    });
}

// What the deltas of one set need of all its rows, and the gradients of weight and bias.
void norm_sums_of(const Op& op, int slot, const Norm<S>& n, const NormTape<S>& t, long b, int out, bool adapted_only,
                  bool first_set, const S* dy) {
    PerTask<S> gw = gradient(out, op.w, adapted_only), gb = gradient(out, op.b, adapted_only);
    long C = n.C;
    S *arrays = norm_scratch(), *partial = arrays + kNormArrays * C, *sums = arrays + kSumD * C;
    norm_parameters<S>(C, weight(slot, op.w).of(b), weight(slot, op.b).of(b), nullptr, nullptr, arrays);
    sum_chunks(n.out_rows(), 2 * C, partial, sums,
               [=](long first, long last, S* mine) { norm_sums(n, arrays, t, first, last, dy, mine); });
    norm_means(n, arrays);
    if (gw) put(op.w_first && first_set, gw.of(b), C, [=](long c) { return arrays[kSumDx * C + c]; });
    if (gb) put(op.b_first && first_set, gb.of(b), C, [=](long c) { return arrays[kSumD * C + c]; });
}

void norm_deltas_of(const Norm<S>& n, const NormTape<S>& t, bool put_first, long first, long last, const S* dy,
                    S* dx) const {
    n.pooled() ? norm_deltas<true>(n, norm_scratch(), t, put_first, first, last, dy, dx)
               : norm_deltas<false>(n, norm_scratch(), t, put_first, first, last, dy, dx);
}

void norm_tangent(const Op& op, int i, int slot, int vector, const TapeView& tape, S* ty) {
    PerTask<const S> w = weight(slot, op.w), bias = weight(slot, op.b), vw = direction(vector, op.w),
                     vb = direction(vector, op.b);
    long N = samples(tape), C = op.width;
    Norm<S> n = norm_of(op, N);
    S *arrays = norm_scratch(), *partial = arrays + kNormArrays * C;
    each_set(n, N, [&](long b, long row, long out_row, long set, bool) {
        NormTape<S> t = norm_tape(op, i, tape, n, row, out_row, set);
        NormTangents<S> v = norm_tangents(op, i, n, row, out_row, set);
        norm_parameters(C, w.of(b), bias.of(b), vw.of(b), vb.of(b), arrays);
        norm_tangent_means_of(n, arrays, t, v, partial);
        each_rows(n.out_rows(), [=](long first, long last) {
            norm_tangent_values(n, arrays, t, v, first, last, ty + out_row * C, const_cast<S*>(v.best));
        });
    });
}

// mean(ẋ) and s of a set.
void norm_tangent_means_of(const Norm<S>& n, const S* arrays, const NormTape<S>& t, const NormTangents<S>& v,
                           S* partial) {
    long C = n.C;
    S *mean = const_cast<S*>(v.mean), *s = const_cast<S*>(v.s);
    if (n.constant || !v.tx) return fill(mean, 2 * C, S(0));
    sum_chunks(n.rows(), 2 * C, partial, mean,
               [=](long first, long last, S* mine) { norm_tangent_moments(n, arrays, t, v.tx, first, last, mine); });
    S m = S(1) / S(n.rows());
    for (long c = 0; c < 2 * C; ++c) mean[c] *= m;
    merge_groups(n, mean);
    merge_groups(n, s);
}

void norm_backward_tangent(const Op& op, int i, int slot, int vector, const TapeView& tape, int out, const S* dy,
                           const S* ey, S* ex) {
    PerTask<const S> w = weight(slot, op.w), bias = weight(slot, op.b), vw = direction(vector, op.w),
                     vb = direction(vector, op.b);
    PerTask<S> hw = gradient(out, op.w, false), hb = gradient(out, op.b, false);
    long N = samples(tape), C = op.width;
    Norm<S> n = norm_of(op, N);
    S *arrays = norm_scratch(), *partial = arrays + kNormArrays * C, *sums = arrays + kSumD * C;
    each_set(n, N, [&](long b, long row, long out_row, long set, bool first_set) {
        NormTape<S> t = norm_tape(op, i, tape, n, row, out_row, set);
        NormTangents<S> v = norm_tangents(op, i, n, row, out_row, set);
        const S *d = dy + out_row * C, *e = ey + out_row * C;
        norm_parameters(C, w.of(b), bias.of(b), vw.of(b), vb.of(b), arrays);
        sum_chunks(n.out_rows(), 4 * C, partial, sums, [=](long first, long last, S* mine) {
            norm_tangent_sums(n, arrays, t, v, first, last, d, e, mine);
        });
        norm_means(n, arrays);
        norm_tangent_means(n, arrays);
        if (hw) put(op.w_first && first_set, hw.of(b), C, [=](long c) { return arrays[kSumTx * C + c]; });
        if (hb) put(op.b_first && first_set, hb.of(b), C, [=](long c) { return arrays[kSumE * C + c]; });
        if (!ex) return;
        S* to = ex + row * C;
        bool put_first = op.delta_first[0];
        each_rows(n.rows(), [=](long first, long last) {
            n.pooled() ? norm_tangent_deltas<true>(n, arrays, t, v, put_first, first, last, d, e, to)
                       : norm_tangent_deltas<false>(n, arrays, t, v, put_first, first, last, d, e, to);
        });
    });
}
