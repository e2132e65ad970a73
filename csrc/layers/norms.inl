// y = w x̂ + b with x̂ = (x − μ)/σ, σ² = var + eps, over groups of m numbers that share μ and σ:
//   u  = δ − mean(δ) − x̂ mean(δ x̂),                       δ = w δy,   δx = u/σ
//   x̂˙ = (ẋ − mean(ẋ) − x̂ s)/σ,  s = mean(x̂ ẋ) = σ˙,      ẏ = w x̂˙ + ẇ x̂ + ḃ
//   u˙ = δ˙ − mean(δ˙) − x̂˙ mean(δ x̂) − x̂ mean(δ˙ x̂ + δ x̂˙),  δ˙ = w δ̇y + ẇ δy
//   δ̇x = (u˙ − u s/σ)/σ
// BatchNorm groups a channel over samples and positions; LayerNorm a row over its features.

// Walks one task's (n, c, l) numbers; `f(index, channel)`. The inner loop is the contiguous one.
template <class F>
inline void each_of_channels(long N, long C, long L, F f) {
    if (L == 1) {
        for (long n = 0; n < N; ++n)
            for (long c = 0; c < C; ++c) f(n * C + c, c);
    } else {
        for (long n = 0; n < N; ++n)
            for (long c = 0; c < C; ++c)
                for (long l = 0; l < L; ++l) f((n * C + c) * L + l, c);
    }
}

// aux: xhat (n·c·l), inv (c).
template <class S>
void batch_norm_forward(const Op& op, long N, const S* __restrict x, const S* __restrict w, const S* __restrict b,
                        S* __restrict y, S* __restrict xhat, S* __restrict inv, S* __restrict scratch) {
    long C = op.width, L = op.length;
    S m = S(1) / S(N * L), *mean = scratch;
    fill(mean, C, S(0));
    fill(inv, C, S(0));
    each_of_channels(N, C, L, [=](long i, long c) { mean[c] += x[i]; });
    for (long c = 0; c < C; ++c) mean[c] *= m;
    each_of_channels(N, C, L, [=](long i, long c) {
        S d = x[i] - mean[c];
        xhat[i] = d;
        inv[c] += d * d;
    });
    for (long c = 0; c < C; ++c) inv[c] = S(1) / sqrt_(inv[c] * m + S(op.f0));
    each_of_channels(N, C, L, [=](long i, long c) {
        xhat[i] *= inv[c];
        y[i] = (w ? w[c] : S(1)) * xhat[i] + (b ? b[c] : S(0));
    });
}

// dw, db: this task's sums Σ δy x̂ and Σ δy, (c) each.
template <class S>
void batch_norm_sums(const Op& op, long N, const S* __restrict xhat, const S* __restrict dy, S* __restrict dw,
                     S* __restrict db) {
    long C = op.width, L = op.length;
    fill(dw, C, S(0));
    fill(db, C, S(0));
    each_of_channels(N, C, L, [=](long i, long c) {
        dw[c] += dy[i] * xhat[i];
        db[c] += dy[i];
    });
}

template <class S>
void batch_norm_backward(const Op& op, bool first, long N, const S* __restrict xhat, const S* __restrict inv,
                         const S* __restrict w, const S* __restrict dw, const S* __restrict db, const S* __restrict dy,
                         S* __restrict dx) {
    long C = op.width, L = op.length;
    S m = S(1) / S(N * L);
    each_of_channels(N, C, L, [=](long i, long c) {
        S g = (w ? w[c] : S(1)) * inv[c];
        S out = g * (dy[i] - m * db[c] - xhat[i] * (m * dw[c]));
        dx[i] = first ? out : dx[i] + out;
    });
}

// taux: xhat˙ (n·c·l), s = mean(x̂ ẋ) (c). tx, vw, vb may be null (zero).
template <class S>
void batch_norm_tangent(const Op& op, long N, const S* __restrict xhat, const S* __restrict inv, const S* __restrict w,
                        const S* __restrict vw, const S* __restrict vb, const S* __restrict tx, S* __restrict ty,
                        S* __restrict txhat, S* __restrict s, S* __restrict scratch) {
    long C = op.width, L = op.length;
    S m = S(1) / S(N * L), *mean = scratch;
    fill(s, C, S(0));
    if (tx) {
        fill(mean, C, S(0));
        each_of_channels(N, C, L, [=](long i, long c) {
            mean[c] += tx[i];
            s[c] += xhat[i] * tx[i];
        });
        for (long c = 0; c < C; ++c) {
            mean[c] *= m;
            s[c] *= m;
        }
    }
    each_of_channels(N, C, L, [=](long i, long c) {
        S t = tx ? (tx[i] - mean[c] - xhat[i] * s[c]) * inv[c] : S(0);
        txhat[i] = t;
        ty[i] = (w ? w[c] : S(1)) * t + (vw ? vw[c] * xhat[i] : S(0)) + (vb ? vb[c] : S(0));
    });
}

// sums (4 c): Σ δy x̂, Σ δy, Σ (δ̇y x̂ + δy x̂˙), Σ δ̇y. The last two are the tangents of dw and db.
template <class S>
void batch_norm_tangent_sums(const Op& op, long N, const S* __restrict xhat, const S* __restrict txhat,
                             const S* __restrict dy, const S* __restrict ey, S* __restrict sums) {
    long C = op.width, L = op.length;
    fill(sums, 4 * C, S(0));
    each_of_channels(N, C, L, [=](long i, long c) {
        sums[c] += dy[i] * xhat[i];
        sums[C + c] += dy[i];
        sums[2 * C + c] += ey[i] * xhat[i] + dy[i] * txhat[i];
        sums[3 * C + c] += ey[i];
    });
}

template <class S>
void batch_norm_backward_tangent(const Op& op, bool first, long N, const S* __restrict xhat, const S* __restrict inv,
                                 const S* __restrict txhat, const S* __restrict s, const S* __restrict w,
                                 const S* __restrict vw, const S* __restrict sums, const S* __restrict dy,
                                 const S* __restrict ey, S* __restrict ex) {
    long C = op.width, L = op.length;
    S m = S(1) / S(N * L);
    each_of_channels(N, C, L, [=](long i, long c) {
        S weight = w ? w[c] : S(1), slope = vw ? vw[c] : S(0);
        S p = m * sums[c], q = m * sums[C + c], tp = m * sums[2 * C + c], tq = m * sums[3 * C + c];
        S u = dy[i] - q - xhat[i] * p;
        S tu = ey[i] - tq - txhat[i] * p - xhat[i] * tp;
        S out = inv[c] * (weight * (tu - u * s[c] * inv[c]) + slope * u);
        ex[i] = first ? out : ex[i] + out;
    });
}

// ---- LayerNorm: every row of `width` features is a group; w and b vary inside it ----------------

// aux: xhat (rows·width), inv (rows).
template <class S>
void layer_norm_forward(const Op& op, long rows, const S* __restrict x, const S* __restrict w, const S* __restrict b,
                        S* __restrict y, S* __restrict xhat, S* __restrict inv) {
    long W = op.width;
    for (long r = 0; r < rows; ++r) {
        const S* xr = x + r * W;
        S* hr = xhat + r * W;
        S mean = sum_of<S>(W, [=](long i) { return xr[i]; }) / S(W);
        S var = sum_of<S>(W, [=](long i) { return (xr[i] - mean) * (xr[i] - mean); }) / S(W);
        S scale = S(1) / sqrt_(var + S(op.f0));
        inv[r] = scale;
        for (long i = 0; i < W; ++i) {
            hr[i] = (xr[i] - mean) * scale;
            y[r * W + i] = (w ? w[i] : S(1)) * hr[i] + (b ? b[i] : S(0));
        }
    }
}

template <class S>
void layer_norm_backward(const Op& op, bool first, long rows, const S* __restrict xhat, const S* __restrict inv,
                         const S* __restrict w, const S* __restrict dy, S* __restrict dx) {
    long W = op.width;
    for (long r = 0; r < rows; ++r) {
        const S *h = xhat + r * W, *d = dy + r * W;
        auto g = [=](long i) { return w ? w[i] * d[i] : d[i]; };
        S q = sum_of<S>(W, g) / S(W);
        S p = sum_of<S>(W, [=](long i) { return g(i) * h[i]; }) / S(W);
        S scale = inv[r];
        put(first, dx + r * W, W, [=](long i) { return scale * (g(i) - q - h[i] * p); });
    }
}

// taux: xhat˙ (rows·width), s (rows).
template <class S>
void layer_norm_tangent(const Op& op, long rows, const S* __restrict xhat, const S* __restrict inv,
                        const S* __restrict w, const S* __restrict vw, const S* __restrict vb, const S* __restrict tx,
                        S* __restrict ty, S* __restrict txhat, S* __restrict s) {
    long W = op.width;
    for (long r = 0; r < rows; ++r) {
        const S *h = xhat + r * W, *t = tx ? tx + r * W : nullptr;
        S mean = t ? sum_of<S>(W, [=](long i) { return t[i]; }) / S(W) : S(0);
        S sr = t ? sum_of<S>(W, [=](long i) { return h[i] * t[i]; }) / S(W) : S(0);
        S scale = inv[r];
        s[r] = sr;
        for (long i = 0; i < W; ++i) {
            S th = t ? (t[i] - mean - h[i] * sr) * scale : S(0);
            txhat[r * W + i] = th;
            ty[r * W + i] = (w ? w[i] : S(1)) * th + (vw ? vw[i] * h[i] : S(0)) + (vb ? vb[i] : S(0));
        }
    }
}

template <class S>
void layer_norm_backward_tangent(const Op& op, bool first, long rows, const S* __restrict xhat, const S* __restrict inv,
                                 const S* __restrict txhat, const S* __restrict s, const S* __restrict w,
                                 const S* __restrict vw, const S* __restrict dy, const S* __restrict ey,
                                 S* __restrict ex) {
    long W = op.width;
    for (long r = 0; r < rows; ++r) {
        const S *h = xhat + r * W, *th = txhat + r * W, *d = dy + r * W, *e = ey + r * W;
        auto g = [=](long i) { return w ? w[i] * d[i] : d[i]; };
        auto tg = [=](long i) { return (w ? w[i] * e[i] : e[i]) + (vw ? vw[i] * d[i] : S(0)); };
        S q = sum_of<S>(W, g) / S(W), tq = sum_of<S>(W, tg) / S(W);
        S p = sum_of<S>(W, [=](long i) { return g(i) * h[i]; }) / S(W);
        S tp = sum_of<S>(W, [=](long i) { return tg(i) * h[i] + g(i) * th[i]; }) / S(W);
        S scale = inv[r], sr = s[r];
        put(first, ex + r * W, W, [=](long i) {
            S u = g(i) - q - h[i] * p, tu = tg(i) - tq - th[i] * p - h[i] * tp;
            return scale * (tu - u * sr * scale);
        });
    }
}
