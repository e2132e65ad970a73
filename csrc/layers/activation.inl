// y = f(x), element by element. The forward pass leaves f' on the tape, and f'' where y and f' do not give it; the
// backward pass leaves f'' δy there, so that the tangents are the same for every f:
//   δx = f' δy      ẏ = f' ẋ      δ̇x = f' δ̇y + f'' δy ẋ

template <Act A>
struct Constant {
    static constexpr Act value = A;
};

// d2 only where y and d1 do not give it.
template <class S>
struct Point {
    S y, d1, d2 = S(0);
};

// As PyTorch has it at kinks, at NaN and at ±∞, where x times a vanished slope is NaN. For finite x nothing overflows
// to NaN: a factor x² or eˣ is bounded, or meets another that has vanished.
template <Act A, class S>
MAML_FAST_INLINED Point<S> activate(S x, S p0, S p1) {
    if constexpr (A == Act::relu) {
        return {x < S(0) ? S(0) : x, x <= S(0) ? S(0) : S(1)};
    } else if constexpr (A == Act::leaky_relu) {
        bool positive = x > S(0);
        return {positive ? x : p0 * x, positive ? S(1) : p0};
    } else if constexpr (A == Act::elu) {
        S t = p1 * (x > S(0) ? S(0) : x), slope = p0 * p1 * exp_(t);
        return {x < S(0) ? p0 * expm1_(t) : x, x > S(0) ? S(1) : slope, x >= S(0) ? S(0) : p1 * slope};
    } else if constexpr (A == Act::gelu) {
        S cdf = S(0.5) * (S(1) + erf_(x * S(0.70710678118654752440)));
        S pdf = S(0.39894228040143267794) * exp_(S(-0.5) * x * x);
        return {x * cdf, cdf + x * pdf, S(2) * pdf - x * pdf * x};
    } else if constexpr (A == Act::gelu_tanh) {
        const S c = S(0.79788456080286535588), a = S(0.044715);
        S z = x > S(32) ? S(32) : x < S(-32) ? S(-32) : x;  // where t has long been ±1
        S u1 = c * (S(1) + S(3) * a * z * z), u2 = S(6) * c * a * z;
        S t = tanh_(c * (z + a * z * z * z)), s = S(1) - t * t;
        return {S(0.5) * x * (S(1) + t), S(0.5) * (S(1) + t + x * s * u1),
                s * u1 + S(0.5) * x * s * (u2 - S(2) * t * u1 * u1)};
    } else if constexpr (A == Act::silu) {
        S s = S(1) / (S(1) + exp_(-x)), ds = s * (S(1) - s);
        return {x * s, s + x * ds, ds * (S(2) + x * (S(1) - S(2) * s))};
    } else if constexpr (A == Act::tanh) {
        S t = tanh_(x);
        return {t, S(1) - t * t};
    } else if constexpr (A == Act::sigmoid) {
        S s = S(1) / (S(1) + exp_(-x));
        return {s, s * (S(1) - s)};
    } else if constexpr (A == Act::softplus) {
        S t = p0 * x, m = abs_(t);
        bool linear = t > p1;
        S s = S(1) / (S(1) + exp_(-t));
        S y = ((t > S(0) ? t : S(0)) + log1p_unit(exp_(-m))) / p0;
        return {linear ? x : y, linear ? S(1) : s, t >= p1 ? S(0) : p0 * s * (S(1) - s)};
    } else if constexpr (A == Act::clamp) {
        return {x < p0 ? p0 : x > p1 ? p1 : x, x <= p0 || x >= p1 ? S(0) : S(1)};
    } else if constexpr (A == Act::hardswish) {
        bool low = x <= S(-3), high = x >= S(3);
        S y = high ? x : x * (low ? S(0) : x + S(3)) / S(6), d1 = high ? S(1) : x / S(3) + S(0.5);
        return {y, low ? S(0) : d1, x > S(-3) && x < S(3) ? S(1) / S(3) : S(0)};
    } else if constexpr (A == Act::mish) {
        // t = tanh(log(1 + eˣ)) and its distance from 1, without either's cancellation
        S e = exp_(x > S(40) ? S(40) : x), n = e * (e + S(2)), near = x > S(40) ? S(0) : S(2) / (n + S(2));
        S t = n / (n + S(2)), s = S(1) / (S(1) + exp_(-x)), dt = s * near * (S(1) + t);
        return {x * t, t + x * dt, S(2) * dt + x * dt * (S(1) - s - S(2) * t * s)};
    } else {
        S sine, cosine;
        sincos_(p0 * x, sine, cosine);
        return {sine, p0 * cosine};
    }
}

template <Act A>
constexpr bool kSecondFromOutput = is_piecewise_linear(A) || A == Act::tanh || A == Act::sigmoid || A == Act::sine;

// f'' from y and f'.
template <Act A, class S>
MAML_FAST_INLINED S second_derivative(S y, S d1, S p0) {
    if constexpr (A == Act::tanh) return S(-2) * y * d1;
    if constexpr (A == Act::sigmoid) return d1 * (S(1) - S(2) * y);
    if constexpr (A == Act::sine) return -p0 * p0 * y;
    return S(0);
}

template <Act A, class S>
inline void activation_map(long n, S p0, S p1, const S* __restrict x, S* __restrict y, S* __restrict d1,
                           S* __restrict d2) {
    if (!d1) {
        for (long i = 0; i < n; ++i) y[i] = activate<A>(x[i], p0, p1).y;
    } else if (!d2 || kSecondFromOutput<A>) {
        for (long i = 0; i < n; ++i) {
            Point<S> p = activate<A>(x[i], p0, p1);
            y[i] = p.y;
            d1[i] = p.d1;
        }
    } else {
        for (long i = 0; i < n; ++i) {
            Point<S> p = activate<A>(x[i], p0, p1);
            y[i] = p.y;
            d1[i] = p.d1;
            d2[i] = p.d2;
        }
    }
}

// The polynomial reduction of float angles loses digits beyond kLargeAngle; libm does not.
inline void large_angles(long n, float w0, const float* x, float* y, float* d1) {
    int large = 0;
    for (long i = 0; i < n; ++i) large |= abs_(w0 * x[i]) > kLargeAngle ? 1 : 0;
    if (!large) return;
    for (long i = 0; i < n; ++i) {
        if (!(abs_(w0 * x[i]) > kLargeAngle)) continue;
        float sine = __builtin_sinf(w0 * x[i]), cosine = __builtin_cosf(w0 * x[i]);
        y[i] = sine;
        if (d1) d1[i] = w0 * cosine;
    }
}
inline void large_angles(long, double, const double*, double*, double*) {}

// f(act) with the activation as a constant.
template <class F>
inline void with_activation(Act act, F f) {
    switch (act) {
        case Act::relu:
            return f(Constant<Act::relu>{});
        case Act::leaky_relu:
            return f(Constant<Act::leaky_relu>{});
        case Act::elu:
            return f(Constant<Act::elu>{});
        case Act::gelu:
            return f(Constant<Act::gelu>{});
        case Act::gelu_tanh:
            return f(Constant<Act::gelu_tanh>{});
        case Act::silu:
            return f(Constant<Act::silu>{});
        case Act::tanh:
            return f(Constant<Act::tanh>{});
        case Act::sigmoid:
            return f(Constant<Act::sigmoid>{});
        case Act::softplus:
            return f(Constant<Act::softplus>{});
        case Act::sine:
            return f(Constant<Act::sine>{});
        case Act::clamp:
            return f(Constant<Act::clamp>{});
        case Act::hardswish:
            return f(Constant<Act::hardswish>{});
        case Act::mish:
            return f(Constant<Act::mish>{});
    }
}

template <class S>
void activation_forward(const Op& op, long n, const S* x, S* y, S* d1, S* d2) {
    S p0 = S(op.f0), p1 = S(op.f1);
    with_activation(op.act, [=](auto act) {
        constexpr Act A = decltype(act)::value;
        activation_map<A>(n, p0, p1, x, y, d1, d2);
        if (A == Act::sine) large_angles(n, p0, x, y, d1);
    });
}

// Activations with a flat part cut what comes back to it, as PyTorch does: there an infinite delta counts for nothing.
constexpr bool cuts(Act act) { return act == Act::relu || act == Act::clamp; }

template <class S>
void activation_backward(Act act, bool first, long n, const S* __restrict d1, const S* __restrict dy,
                         S* __restrict dx) {
    if (cuts(act))
        put(first, dx, n, [=](long i) { return d1[i] == S(0) ? S(0) : dy[i]; });
    else
        put(first, dx, n, [=](long i) { return d1[i] * dy[i]; });
}

// The same, and curvature ← f'' δy.
template <Act A, class S>
inline void curved_backward(bool first, long n, S p0, const S* __restrict y, const S* __restrict d1,
                            const S* __restrict dy, S* __restrict dx, S* __restrict curvature) {
    put(first, dx, n, [=](long i) {
        if constexpr (kSecondFromOutput<A>)
            curvature[i] = second_derivative<A>(y[i], d1[i], p0) * dy[i];
        else
            curvature[i] *= dy[i];
        return d1[i] * dy[i];
    });
}

template <class S>
void activation_backward(const Op& op, bool first, long n, const S* y, const S* d1, const S* dy, S* dx, S* curvature) {
    if (!curvature) return activation_backward(op.act, first, n, d1, dy, dx);
    with_activation(op.act, [=, &op](auto act) {
        curved_backward<decltype(act)::value>(first, n, S(op.f0), y, d1, dy, dx, curvature);
    });
}

template <class S>
void activation_tangent(long n, const S* __restrict d1, const S* __restrict tx, S* __restrict ty) {
    put(true, ty, n, [=](long i) { return d1[i] * tx[i]; });
}

// curvature or tx null: f'' = 0 or ẋ = 0.
template <class S>
void activation_backward_tangent(Act act, bool first, long n, const S* __restrict d1, const S* __restrict curvature,
                                 const S* __restrict tx, const S* __restrict ey, S* __restrict ex) {
    if (curvature && tx)
        put(first, ex, n, [=](long i) { return d1[i] * ey[i] + curvature[i] * tx[i]; });
    else
        activation_backward(act, first, n, d1, ey, ex);
}
