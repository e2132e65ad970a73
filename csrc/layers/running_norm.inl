// y = w x̂ + b with x̂ = (x − μ) r, r = 1/√(var + eps), for constants μ and var (BatchNorm in eval mode).
//   δx = w r δy      ẏ = w r ẋ + ẇ x̂ + ḃ      δ̇x = r (w δ̇y + ẇ δy)

// aux: xhat (n·c·l), r (c).
template <class S>
void running_norm_forward(const Op& op, long N, const S* __restrict mean, const S* __restrict variance,
                          const S* __restrict x, const S* __restrict w, const S* __restrict b, S* __restrict y,
                          S* __restrict xhat, S* __restrict r) {
    long C = op.width;
    for (long c = 0; c < C; ++c) r[c] = S(1) / sqrt_(variance[c] + S(op.f0));
    each_of_channels(N, C, op.length, [=](long i, long c) {
        xhat[i] = (x[i] - mean[c]) * r[c];
        y[i] = (w ? w[c] : S(1)) * xhat[i] + (b ? b[c] : S(0));
    });
}

template <class S>
void running_norm_backward(const Op& op, bool first, long N, const S* __restrict r, const S* __restrict w,
                           const S* __restrict dy, S* __restrict dx) {
    each_of_channels(N, op.width, op.length, [=](long i, long c) {
        S out = (w ? w[c] : S(1)) * r[c] * dy[i];
        dx[i] = first ? out : dx[i] + out;
    });
}

// taux: xhat˙ = r ẋ.
template <class S>
void running_norm_tangent(const Op& op, long N, const S* __restrict xhat, const S* __restrict r, const S* __restrict w,
                          const S* __restrict vw, const S* __restrict vb, const S* __restrict tx, S* __restrict ty,
                          S* __restrict txhat) {
    each_of_channels(N, op.width, op.length, [=](long i, long c) {
        S t = tx ? r[c] * tx[i] : S(0);
        txhat[i] = t;
        ty[i] = (w ? w[c] : S(1)) * t + (vw ? vw[c] * xhat[i] : S(0)) + (vb ? vb[c] : S(0));
    });
}

template <class S>
void running_norm_backward_tangent(const Op& op, bool first, long N, const S* __restrict r, const S* __restrict w,
                                   const S* __restrict vw, const S* __restrict dy, const S* __restrict ey,
                                   S* __restrict ex) {
    each_of_channels(N, op.width, op.length, [=](long i, long c) {
        S out = r[c] * ((w ? w[c] : S(1)) * ey[i] + (vw ? vw[c] * dy[i] : S(0)));
        ex[i] = first ? out : ex[i] + out;
    });
}
