// Part of Engine: LayerNorm.

void layer_norm_values(const Op& op, int slot, long N, long size, const S* x, S* y, S* xhat, S* inv) {
    PerTask<const S> w = weight(slot, op.w), bias = weight(slot, op.b);
    long rows = N * op.rows;
    for (long b = 0; b < B_; ++b)
        layer_norm_forward<S>(op, rows, x + b * size, w.of(b), bias.of(b), y + b * size, xhat + b * size,
                              inv + b * rows);
}

void layer_norm_deltas(const Op& op, int i, int slot, const TapeView& tape, int out, bool adapted_only, const S* dy,
                       S* dx) {
    PerTask<S> gw = gradient(out, op.w, adapted_only), gb = gradient(out, op.b, adapted_only);
    PerTask<const S> w = weight(slot, op.w);
    long size = per_task(tape, op.out), rows = samples(tape) * op.rows, C = op.width;
    S* sums = scratch();
    for (long b = 0; b < B_; ++b) {
        const S *hb = ws_ + tape.aux1[i] + b * size, *ib = ws_ + tape.aux2[i] + b * rows, *db = dy + b * size;
        if (dx) layer_norm_backward<S>(op, op.delta_first[0], rows, hb, ib, w.of(b), db, dx + b * size);
        if (gw || gb) row_norm_sums(C, rows, hb, db, sums);
        if (gw) put(op.w_first, gw.of(b), C, [=](long c) { return sums[c]; });
        if (gb) put(op.b_first, gb.of(b), C, [=](long c) { return sums[C + c]; });
    }
}

// Σ_rows δy x̂ and Σ_rows δy, for norms whose weights run along the row.
static void row_norm_sums(long C, long rows, const S* xhat, const S* dy, S* sums) {
    fill(sums, 2 * C, S(0));
    for (long r = 0; r < rows; ++r)
        for (long c = 0; c < C; ++c) {
            sums[c] += dy[r * C + c] * xhat[r * C + c];
            sums[C + c] += dy[r * C + c];
        }
}

void layer_norm_tangents(const Op& op, int i, int slot, int vector, const TapeView& tape, const S* tx, S* ty) {
    PerTask<const S> w = weight(slot, op.w), vw = direction(vector, op.w), vb = direction(vector, op.b);
    long size = per_task(tape, op.out), rows = samples(tape) * op.rows;
    for (long b = 0; b < B_; ++b)
        layer_norm_tangent<S>(op, rows, ws_ + tape.aux1[i] + b * size, ws_ + tape.aux2[i] + b * rows, w.of(b), vw.of(b),
                              vb.of(b), tx ? tx + b * size : nullptr, ty + b * size, ws_ + tangents_.aux1[i] + b * size,
                              ws_ + tangents_.aux2[i] + b * rows);
}

void layer_norm_tangent_deltas(const Op& op, int i, int slot, int vector, const TapeView& tape, int out, const S* dy,
                               const S* ey, S* ex) {
    PerTask<const S> w = weight(slot, op.w), vw = direction(vector, op.w);
    PerTask<S> hw = gradient(out, op.w, false), hb = gradient(out, op.b, false);
    long size = per_task(tape, op.out), rows = samples(tape) * op.rows, C = op.width;
    S* sums = scratch();
    for (long b = 0; b < B_; ++b) {
        const S *xh = ws_ + tape.aux1[i] + b * size, *ib = ws_ + tape.aux2[i] + b * rows;
        const S *th = ws_ + tangents_.aux1[i] + b * size, *sb = ws_ + tangents_.aux2[i] + b * rows;
        const S *db = dy + b * size, *eb = ey + b * size;
        row_norm_tangent_sums(C, rows, xh, th, db, eb, sums);
        if (ex)
            layer_norm_backward_tangent<S>(op, op.delta_first[0], rows, xh, ib, th, sb, w.of(b), vw.of(b), db, eb,
                                           ex + b * size);
        if (hw) put(op.w_first, hw.of(b), C, [=](long c) { return sums[2 * C + c]; });
        if (hb) put(op.b_first, hb.of(b), C, [=](long c) { return sums[3 * C + c]; });
    }
}

static void row_norm_tangent_sums(long C, long rows, const S* xhat, const S* txhat, const S* dy, const S* ey, S* sums) {
    fill(sums + 2 * C, 2 * C, S(0));
    for (long r = 0; r < rows; ++r)
        for (long c = 0; c < C; ++c) {
            long i = r * C + c;
            sums[2 * C + c] += ey[i] * xhat[i] + dy[i] * txhat[i];
            sums[3 * C + c] += ey[i];
        }
}
