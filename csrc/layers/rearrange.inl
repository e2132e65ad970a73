// Layers that only move numbers; each with its transpose, which adds where another consumer wrote before.
//   transpose: (a, b) → (b, a) of every sample        pad: zeros around (y, x, c)        upsample: every number scale²
//   times

template <class S>
void transpose_samples(bool first, long samples, long A, long B, const S* x, S* y) {
    for (long n = 0; n < samples; ++n, x += A * B, y += A * B)
        for (long b = 0; b < B; ++b) {
            S* to = y + b * A;
            put(first, to, A, [=](long a) { return x[a * B + b]; });
        }
}

// window.h, w: of the inner image; ph, pw: rows and columns of zeros on each side.
template <class S>
void pad_forward(const Window& g, long C, long first, long last, const S* x, S* y) {
    long in = g.w * C, W = g.ow * C;
    fill(y + first * g.oh * W, (last - first) * g.oh * W, S(0));
    for (long n = first; n < last; ++n)
        for (long r = 0; r < g.h; ++r) copy(x + (n * g.h + r) * in, y + (n * g.oh + r + g.ph) * W + g.pw * C, in);
}

template <class S>
void pad_backward(const Window& g, long C, bool put_first, long first, long last, const S* dy, S* dx) {
    long in = g.w * C, W = g.ow * C;
    for (long n = first; n < last; ++n)
        for (long r = 0; r < g.h; ++r) {
            const S* from = dy + (n * g.oh + r + g.ph) * W + g.pw * C;
            put(put_first, dx + (n * g.h + r) * in, in, [=](long i) { return from[i]; });
        }
}

// window.sh, sw: the scales.
template <class S>
void upsample_forward(const Window& g, long C, long first, long last, const S* x, S* y) {
    for (long n = first; n < last; ++n)
        for (long r = 0; r < g.oh; ++r)
            for (long q = 0; q < g.ow; ++q)
                copy(x + ((n * g.h + r / g.sh) * g.w + q / g.sw) * C, y + ((n * g.oh + r) * g.ow + q) * C, C);
}

// dx += transpose of the above.
template <class S>
void upsample_backward(const Window& g, long C, long first, long last, const S* dy, S* dx) {
    for (long n = first; n < last; ++n)
        for (long r = 0; r < g.oh; ++r)
            for (long q = 0; q < g.ow; ++q) {
                const S* from = dy + ((n * g.oh + r) * g.ow + q) * C;
                put(false, dx + ((n * g.h + r / g.sh) * g.w + q / g.sw) * C, C, [=](long c) { return from[c]; });
            }
}
