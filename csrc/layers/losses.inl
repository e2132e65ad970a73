// L = mean over a task's samples; δ = ∂L/∂z and its tangent δ̇ = (∂²L/∂z²) ż for outputs z.
//   mse            (z − y)²              cross_entropy   −Σ_c q_c log softmax(z)_c
//   bce_with_logits  max(z,0) − z y + log(1 + e^−|z|)
//   l1             |z − y|               huber           r²/2 within d, d(|r| − d/2) beyond
// A loss of a person's own is the network's output, `value`: a number for each task.
// Label smoothing s: q = (1 − s) onehot + s / classes.

template <class S>
MAML_FAST_INLINED S sign_of(S r) {
    return r > S(0) ? S(1) : r < S(0) ? S(-1) : r;  // keeps 0 and NaN
}

template <class S>
MAML_FAST_INLINED S pointwise_value(LossKind kind, S z, S y, S d) {
    S r = z - y;
    switch (kind) {
        case LossKind::mse:
            return r * r;
        case LossKind::bce_with_logits:
            return (z < S(0) ? S(0) : z) - z * y + log1p_unit(exp_(-abs_(z)));
        case LossKind::l1:
            return abs_(r);
        case LossKind::huber:
            return abs_(r) > d ? d * (abs_(r) - S(0.5) * d) : S(0.5) * r * r;
        case LossKind::cross_entropy:  // works on rows
        case LossKind::value:          // is the output
            break;
    }
    __builtin_unreachable();
}

template <class S>
MAML_FAST_INLINED S pointwise_slope(LossKind kind, S z, S y, S d) {
    S r = z - y;
    switch (kind) {
        case LossKind::mse:
            return S(2) * r;
        case LossKind::bce_with_logits:
            return S(1) / (S(1) + exp_(-z)) - y;
        case LossKind::l1:
            return sign_of(r);
        case LossKind::huber:
            return abs_(r) > d ? d * sign_of(r) : r;
        case LossKind::cross_entropy:
        case LossKind::value:
            break;
    }
    __builtin_unreachable();
}

template <class S>
MAML_FAST_INLINED S pointwise_curvature(LossKind kind, S z, S y, S d) {
    switch (kind) {
        case LossKind::mse:
            return S(2);
        case LossKind::bce_with_logits: {
            S s = S(1) / (S(1) + exp_(-z));
            return s * (S(1) - s);
        }
        case LossKind::l1:
            return S(0);
        case LossKind::huber:
            return abs_(z - y) < d ? S(1) : S(0);  // none at the kink, as in PyTorch
        case LossKind::cross_entropy:
        case LossKind::value:
            break;
    }
    __builtin_unreachable();
}

// softmax of each row into p; returns Σ_rows of the cross entropy, log Σ_c exp(z_c − top) − Σ_c q_c (z_c − top).
// Without the top, a logit's rounding would be all that is left of the loss of a confident row.
template <class S>
S cross_entropy_value(long N, long C, S smoothing, const S* z, const std::int64_t* labels, S* p) {
    S total = S(0);
    for (long n = 0; n < N; ++n, z += C, p += C) {
        S top = z[0], sum = S(0), all = S(0);
        for (long c = 1; c < C; ++c) top = z[c] > top ? z[c] : top;
        for (long c = 0; c < C; ++c) {
            p[c] = exp_(z[c] - top);
            sum += p[c];
            all += z[c] - top;
        }
        S inverse = S(1) / sum;
        for (long c = 0; c < C; ++c) p[c] *= inverse;
        total += log_(sum) - (S(1) - smoothing) * (z[labels[n]] - top);
        if (smoothing != S(0)) total -= smoothing / S(C) * all;  // a class ruled out has z = −∞
    }
    return total;
}

template <class S>
void cross_entropy_slope(long N, long C, S smoothing, S scale, const std::int64_t* labels, const S* p, S* dz) {
    S floor = smoothing / S(C);
    for (long n = 0; n < N; ++n)
        for (long c = 0; c < C; ++c) {
            S q = floor + (labels[n] == c ? S(1) - smoothing : S(0));
            dz[n * C + c] = scale * (p[n * C + c] - q);
        }
}

template <class S>
void cross_entropy_tangent(long N, long C, S scale, const S* p, const S* tz, S* ez) {
    for (long n = 0; n < N; ++n, p += C, tz += C, ez += C) {
        S dot = S(0);
        for (long c = 0; c < C; ++c) dot += p[c] * tz[c];
        for (long c = 0; c < C; ++c) ez[c] = scale * p[c] * (tz[c] - dot);
    }
}
