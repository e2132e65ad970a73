// Part of Engine: convolutions, and the norms right behind them.

void conv_values(const Op& op, int slot, long N, const S* x, S* y) const {
    PerTask<const S> w = weight(slot, op.w), bias = weight(slot, op.b);
    conv_products(op, N, x, w, nullptr, w, bias, y);
}

// y = w * x + v * x' + bias.
void conv_products(const Op& op, long N, const S* x, PerTask<const S> w, const S* x2, PerTask<const S> v,
                   PerTask<const S> bias, S* y) const {
    const Convolution& c = *op.conv;
    for (long b = 0; b < B_; ++b) {
        auto pair = [&](const S* p, PerTask<const S> weights) {
            return p ? Pair<S>{p + b * N * c.in_size(), weights.of(b)} : Pair<S>{nullptr, nullptr};
        };
        Pair<S> one = pair(x, w), two = pair(x2, v);
        const S* bb = bias.of(b);
        S* yb = y + b * N * c.out_size();
        each_share(N, c.window.oh * c.window.ow, c.pass_outputs(),
                   [=, &c](const Share& share) { conv_forward(c, one, two, bb, false, share, yb); });
    }
}

// The flipped weights of task b: shared ones are packed already.
const S* flipped(const Op& op, PerTask<const S> w, long b, S* memory) const {
    if (w.stride == 0) return arena_ + op.pack_backward;
    flip_weights(plan_.params[op.w].o, op.conv->group_channels(), op.conv->kernel(), w.of(b), memory);
    return memory;
}

// dx (+)= wᵀ * dy + vᵀ * dy'.
void conv_deltas(const Op& op, bool first_writer, long N, const S* dy, PerTask<const S> w, const S* dy2,
                 PerTask<const S> v, S* dx) const {
    const Convolution& c = *op.conv;
    long size = N * c.out_size();
    for (long b = 0; b < B_; ++b) {
        Pair<S> one{dy + b * size, flipped(op, w, b, scratch())}, two{nullptr, nullptr};
        if (dy2) two = {dy2 + b * size, flipped(op, v, b, scratch() + plan_.params[op.w].size)};
        S* to = dx + b * N * c.in_size();
        each_share(N, c.window.h * c.window.w, c.pass_channels(),
                   [=, &c](const Share& share) { conv_backward(c, one, two, !first_writer, share, to); });
    }
}

void conv_gradients(const Op& op, bool add, long N, const S* x, const S* dy, PerTask<S> gw, PerTask<S> gb) const {
    const Convolution& c = *op.conv;
    for (long b = 0; b < B_; ++b) {
        const S *xb = x + b * N * c.in_size(), *db = dy + b * N * c.out_size();
        if (gw) conv_weight_gradient(c, add || !op.w_first, 0, N, xb, db, gw.of(b));
        if (gb) conv_bias_gradient(op, N, db, gb.of(b));
    }
}

void conv_backward_values(const Op& op, const Instr& in, const TapeView& tape, const S* dy, S* dx) const {
    PerTask<S> gw = gradient(in.out, op.w, adapted_only(in)), gb = gradient(in.out, op.b, adapted_only(in));
    PerTask<const S> w = weight(in.theta, op.w);
    long N = samples(tape);
    if (dx) conv_deltas(op, op.delta_first[0], N, dy, w, nullptr, w, dx);
    conv_gradients(op, false, N, value(tape, op.in[0]), dy, gw, gb);
}

// Of samples [begin, end) of one task.
void conv_weight_gradient(const Convolution& c, bool add, long begin, long end, const S* x, const S* dy, S* to) const {
    long rows = call_.team > 1 ? 4 * kLatticeRows : kLatticeRows;
    each_position_tile(c, begin, end, rows, [&](long first, long last, long top, long bottom) {
        bool sum = add;
        each(gradient_tiles(c),
             [=, &c](long i) { conv_gradient_tile(c, i, first, last, top, bottom, x, dy, sum, to); });
        add = true;
    });
}

void conv_bias_gradient(const Op& op, long N, const S* dy, S* to) const {
    const Convolution& c = *op.conv;
    if (!op.bias_cancels) return sum_rows(op.b_first, N * c.window.oh * c.window.ow, c.outputs, dy, to);
    if (op.b_first) fill(to, c.outputs, S(0));
}

// ---- convolutions and the norms behind them, together while the samples are in cache ---------

bool pairs_with_norm(int conv) const {
    return call_.team <= 1 && conv + 1 < plan_.n_ops && plan_.ops[conv + 1].behind_conv;
}

// Calls f(first, last) for runs of samples of `size` numbers that the nearer caches hold.
template <class F>
static void each_cached(long N, long size, F f) {
    constexpr long kNumbers = (256 << 10) / sizeof(S);
    long step = size < kNumbers ? kNumbers / size : 1;
    for (long n = 0; n < N; n += step) f(n, least(n + step, N));
}

void conv_norm_forward(const Op& conv, const Op& norm, int i, int slot, const TapeView& tape) {
    const Convolution& c = *conv.conv;
    PerTask<const S> w = weight(slot, conv.w), bias = weight(slot, conv.b);
    long N = samples(tape), positions = c.window.oh * c.window.ow;
    Norm<S> n = norm_of(norm, N);
    S* partial = norm_scratch() + kNormArrays * n.C;
    for (long b = 0; b < B_; ++b) {
        Pair<S> one{value(tape, conv.in[0]) + b * N * c.in_size(), w.of(b)}, none{nullptr, nullptr};
        S* z = output(tape, conv.out) + b * N * c.out_size();
        long chunks = 0;
        each_cached(N, c.out_size(), [&](long first, long last) {
            conv_forward(c, one, none, bias.of(b), false, Share{first, last, 0, c.pass_outputs()}, z);
            if (n.constant) return;
            long whole = last == N ? ceil_div(n.rows(), kNormChunk) : last * positions / kNormChunk;
            for (; chunks < whole; ++chunks) chunk_moments(n, z, chunks, partial);
        });
        NormTape<S> t = norm_tape(norm, i, tape, n, b * n.rows(), b * n.out_rows(), b);
        norm_values_of(norm, slot, n, t, b, output(tape, norm.out) + b * n.out_rows() * n.C,
                       [&](S* mean, S* inv) { merge_moments(n, partial, mean, inv); });
    }
}

// The reverse sweep through both: deltas of the convolution's output are used while they are warm.
void conv_norm_backward(const Op& conv, const Op& norm, int i, int slot, const TapeView& tape, int out,
                        bool adapted_only, S* dz, S* dx) {
    const Convolution& c = *conv.conv;
    PerTask<S> gw = gradient(out, conv.w, adapted_only), gb = gradient(out, conv.b, adapted_only);
    long N = samples(tape), positions = c.window.oh * c.window.ow;
    Norm<S> n = norm_of(norm, N);
    for (long b = 0; b < B_; ++b) {
        NormTape<S> t = norm_tape(norm, i, tape, n, b * n.rows(), b * n.out_rows(), b);
        const S *dy = ws_ + tape.delta[norm.out] + b * n.out_rows() * n.C,
                *x = value(tape, conv.in[0]) + b * N * c.in_size();
        S *d = dz + b * n.rows() * n.C, *to = dx ? dx + b * N * c.in_size() : nullptr;
        norm_sums_of(norm, slot, n, t, b, out, adapted_only, true, dy);
        Pair<S> one{d, dx ? flipped(conv, weight(slot, conv.w), b, scratch()) : nullptr}, none{nullptr, nullptr};
        bool add = !conv.w_first;
        each_cached(N, c.out_size(), [&](long first, long last) {
            norm_deltas_of(n, t, true, first * positions, last * positions, dy, d);
            if (dx) conv_backward(c, one, none, !conv.delta_first[0], Share{first, last, 0, c.pass_channels()}, to);
            if (gw) conv_weight_gradient(c, add, first, last, x, d, gw.of(b));
            add = true;
        });
        if (gb) conv_bias_gradient(conv, N, d, gb.of(b));
    }
}

// to (+)= Σ_rows.
void sum_rows(bool first_writer, long rows, long width, const S* m, S* to) const {
    S *sums = norm_scratch(), *partial = sums + width;
    sum_chunks(rows, width, partial, sums, [=](long first, long last, S* mine) {
        column_sums<S>(last - first, width, m + first * width, nullptr, S(1), mine);
    });
    put(first_writer, to, width, [=](long i) { return sums[i]; });
}

void conv_tangent(const Op& op, const Instr& in, const TapeView& tape, const S* tx, S* ty) {
    PerTask<const S> w = weight(in.theta, op.w), v = direction(in.vector, op.w), vb = direction(in.vector, op.b);
    const S* x = v ? value(tape, op.in[0]) : nullptr;
    if (tx)
        conv_products(op, samples(tape), tx, w, x, v, vb, ty);
    else
        conv_products(op, samples(tape), x, v, nullptr, v, vb, ty);
}

void conv_backward_tangent(const Op& op, const Instr& in, const TapeView& tape, const S* tx, const S* dy, const S* ey,
                           S* ex) {
    long N = samples(tape);
    PerTask<const S> v = direction(in.vector, op.w);
    if (ex) conv_deltas(op, op.delta_first[0], N, ey, weight(in.theta, op.w), v ? dy : nullptr, v, ex);
    PerTask<S> hw = gradient(in.out, op.w, false), hb = gradient(in.out, op.b, false), none{nullptr, 0};
    conv_gradients(op, false, N, value(tape, op.in[0]), ey, hw, hb);
    if (tx) conv_gradients(op, true, N, tx, dy, hw, none);
}
