// LayerNorm: y = w x̂ + b with x̂ = (x − μ)/σ, σ² = var + eps, over every row of `width` features:
//   u  = δ − mean(δ) − x̂ mean(δ x̂),                       δ = w δy,   δx = u/σ
//   x̂˙ = (ẋ − mean(ẋ) − x̂ s)/σ,  s = mean(x̂ ẋ) = σ˙,      ẏ = w x̂˙ + ẇ x̂ + ḃ
//   u˙ = δ˙ − mean(δ˙) − x̂˙ mean(δ x̂) − x̂ mean(δ˙ x̂ + δ x̂˙),  δ˙ = w δ̇y + ẇ δy
//   δ̇x = (u˙ − u s/σ)/σ

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
