// Softmax and its logarithm over rows; p is the softmax.
//   y = p:       δx = p (δy − Σ p δy)      ẏ = p (ẋ − Σ p ẋ)      δ̇x = ẏ (δy − Σ p δy) + p (δ̇y − Σ ẏ δy − Σ p δ̇y)
//   y = log p:   δx = δy − p Σ δy          ẏ = ẋ − Σ p ẋ          δ̇x = δ̇y − p ẏ Σ δy − p Σ δ̇y

template <class S>
void softmax_row(bool logarithm, long n, const S* x, S* y) {
    S most = x[0];
    for (long i = 1; i < n; ++i) most = x[i] > most || x[i] != x[i] ? x[i] : most;
    for (long i = 0; i < n; ++i) y[i] = exp_(x[i] - most);
    const S sum = sum_of<S>(n, [=](long i) { return y[i]; });
    if (logarithm) {
        const S shift = most + log_(sum);
        for (long i = 0; i < n; ++i) y[i] = x[i] - shift;
    } else {
        for (long i = 0; i < n; ++i) y[i] /= sum;
    }
}

template <class S>
void softmax_tangent_row(bool logarithm, long n, const S* y, const S* tx, S* ty) {
    if (logarithm) {
        const S mean = sum_of<S>(n, [=](long i) { return exp_(y[i]) * tx[i]; });
        for (long i = 0; i < n; ++i) ty[i] = tx[i] - mean;
    } else {
        const S mean = sum_of<S>(n, [=](long i) { return y[i] * tx[i]; });
        for (long i = 0; i < n; ++i) ty[i] = y[i] * (tx[i] - mean);
    }
}

template <class S>
void softmax_backward_row(bool logarithm, bool first, long n, const S* y, const S* dy, S* dx) {
    if (logarithm) {
        const S sum = sum_of<S>(n, [=](long i) { return dy[i]; });
        put(first, dx, n, [=](long i) { return dy[i] - exp_(y[i]) * sum; });
    } else {
        const S mean = sum_of<S>(n, [=](long i) { return y[i] * dy[i]; });
        put(first, dx, n, [=](long i) { return y[i] * (dy[i] - mean); });
    }
}

// ty null: no tangent comes in.
template <class S>
void softmax_backward_tangent_row(bool logarithm, bool first, long n, const S* y, const S* ty, const S* dy, const S* ey,
                                  S* ex) {
    if (!ty) return softmax_backward_row(logarithm, first, n, y, ey, ex);
    if (logarithm) {
        const S sum = sum_of<S>(n, [=](long i) { return dy[i]; }), other = sum_of<S>(n, [=](long i) { return ey[i]; });
        put(first, ex, n, [=](long i) { return ey[i] - exp_(y[i]) * (ty[i] * sum + other); });
    } else {
        const S mean = sum_of<S>(n, [=](long i) { return y[i] * dy[i]; });
        const S other = sum_of<S>(n, [=](long i) { return ty[i] * dy[i] + y[i] * ey[i]; });
        put(first, ex, n, [=](long i) { return ty[i] * (dy[i] - mean) + y[i] * (ey[i] - other); });
    }
}

// ---- the largest along an axis: (outer, n, inner) to (outer, inner), and where it is ------------

template <class S>
void max_over(long outer, long n, long inner, const S* x, S* y, S* where) {
    for (long o = 0; o < outer; ++o, x += n * inner, y += inner, where += inner) {
        copy(x, y, inner);
        fill(where, inner, S(0));
        for (long k = 1; k < n; ++k)
            for (long i = 0; i < inner; ++i) {
                const S v = x[k * inner + i];
                const bool more = y[i] == y[i] && (v > y[i] || v != v);  // the first NaN wins, as in PyTorch
                y[i] = more ? v : y[i];
                where[i] = more ? S(k) : where[i];
            }
    }
}

template <class S>
void max_over_tangent(long outer, long n, long inner, const S* where, const S* tx, S* ty) {
    for (long o = 0; o < outer; ++o, tx += n * inner, ty += inner, where += inner)
        for (long i = 0; i < inner; ++i) ty[i] = tx[long(where[i]) * inner + i];
}

template <class S>
void max_over_backward(bool first, long outer, long n, long inner, const S* where, const S* dy, S* dx) {
    if (first) fill(dx, outer * n * inner, S(0));
    for (long o = 0; o < outer; ++o, dx += n * inner, dy += inner, where += inner)
        for (long i = 0; i < inner; ++i) dx[long(where[i]) * inner + i] += dy[i];
}
