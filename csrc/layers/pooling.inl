// Pools over windows of channels-last samples (n, y, x, c).
//   max:  y = x at the window's first maximum        δx = δy there      ẏ = ẋ there      δ̇x = δ̇y there
//   mean: y = Σ_window x / count                     δx = Σ_windows δy / count            (linear: so are its tangents)

// Calls f(row of y, row of x, place in the window, rows of the window inside the sample), windows in order.
template <class F>
void each_window(const Window& g, long first, long last, F f) {
    auto inside = [](long start, long kernel, long dilation, long size) {
        long count = 0;
        for (long k = 0; k < kernel; ++k) count += start + k * dilation >= 0 && start + k * dilation < size;
        return count;
    };
    for (long n = first; n < last; ++n)
        for (long oy = 0; oy < g.oh; ++oy)
            for (long ox = 0; ox < g.ow; ++ox) {
                long y0 = oy * g.sh - g.ph, x0 = ox * g.sw - g.pw;
                long count = inside(y0, g.kh, g.dh, g.h) * inside(x0, g.kw, g.dw, g.w);
                for (long ky = 0; ky < g.kh; ++ky)
                    for (long kx = 0; kx < g.kw; ++kx) {
                        long y = y0 + ky * g.dh, x = x0 + kx * g.dw;
                        if (y < 0 || y >= g.h || x < 0 || x >= g.w) continue;
                        f((n * g.oh + oy) * g.ow + ox, (n * g.h + y) * g.w + x, ky * g.kw + kx, count);
                    }
            }
}

template <class S>
void max_pool_forward(const Window& g, long C, long first, long last, const S* x, S* y, S* where) {
    long before = -1;
    each_window(g, first, last, [&](long o, long i, long place, long) {
        const S* __restrict in = x + i * C;
        S* __restrict out = y + o * C, * __restrict at = where + o * C, k = S(place);
        if (o != before) {
            copy(in, out, C);
            fill(at, C, k);
        } else {
            for (long c = 0; c < C; ++c) {
                bool more = in[c] > out[c] || in[c] != in[c];  // a NaN wins, as in PyTorch
                out[c] = more ? in[c] : out[c];
                at[c] = more ? k : at[c];
            }
        }
        before = o;
    });
}

// dx += δy at the maxima.
template <class S>
void max_pool_backward(const Window& g, long C, long first, long last, const S* where, const S* dy, S* dx) {
    each_window(g, first, last, [&](long o, long i, long place, long) {
        const S* __restrict d = dy + o * C, * __restrict at = where + o * C;
        S* __restrict to = dx + i * C, k = S(place);
        for (long c = 0; c < C; ++c) to[c] += at[c] == k ? d[c] : S(0);
    });
}

template <class S>
void max_pool_tangent(const Window& g, long C, long first, long last, const S* where, const S* tx, S* ty) {
    each_window(g, first, last, [&](long o, long i, long place, long) {
        const S* __restrict t = tx + i * C, * __restrict at = where + o * C;
        S* __restrict to = ty + o * C, k = S(place);
        for (long c = 0; c < C; ++c) to[c] = at[c] == k ? t[c] : to[c];
    });
}

// `whole`: divide by the window's size, padding included.
template <class S>
void avg_pool_forward(const Window& g, bool whole, long C, long first, long last, const S* x, S* y) {
    long out = g.oh * g.ow * C;
    fill(y + first * out, (last - first) * out, S(0));
    each_window(g, first, last, [&](long o, long i, long, long count) {
        const S* __restrict in = x + i * C;
        S* __restrict to = y + o * C, f = S(1) / S(whole ? g.kh * g.kw : count);
        for (long c = 0; c < C; ++c) to[c] += f * in[c];
    });
}

// dx += transpose of the above.
template <class S>
void avg_pool_backward(const Window& g, bool whole, long C, long first, long last, const S* dy, S* dx) {
    each_window(g, first, last, [&](long o, long i, long, long count) {
        const S* __restrict d = dy + o * C;
        S* __restrict to = dx + i * C, f = S(1) / S(whole ? g.kh * g.kw : count);
        for (long c = 0; c < C; ++c) to[c] += f * d[c];
    });
}
