// Primitives of expressions over blocks of elements. Masks are 1 and 0.

template <class S>
MAML_FAST_INLINED S sign_(S x) {
    return x > S(0) ? S(1) : x < S(0) ? S(-1) : S(0);
}

MAML_FAST_INLINED float floor_(float x) { return __builtin_floorf(x); }
MAML_FAST_INLINED double floor_(double x) { return __builtin_floor(x); }
MAML_FAST_INLINED float ceil_(float x) { return __builtin_ceilf(x); }
MAML_FAST_INLINED double ceil_(double x) { return __builtin_ceil(x); }
MAML_FAST_INLINED float trunc_(float x) { return __builtin_truncf(x); }
MAML_FAST_INLINED double trunc_(double x) { return __builtin_trunc(x); }
MAML_FAST_INLINED float round_(float x) { return __builtin_rintf(x); }  // half to even
MAML_FAST_INLINED double round_(double x) { return __builtin_rint(x); }
MAML_FAST_INLINED float log1p_(float x) { return __builtin_log1pf(x); }
MAML_FAST_INLINED double log1p_(double x) { return __builtin_log1p(x); }
MAML_FAST_INLINED float pow_(float x, float y) { return __builtin_powf(x, y); }
MAML_FAST_INLINED double pow_(double x, double y) { return __builtin_pow(x, y); }
MAML_FAST_INLINED float fmod_(float x, float y) { return __builtin_fmodf(x, y); }
MAML_FAST_INLINED double fmod_(double x, double y) { return __builtin_fmod(x, y); }

// sin or cos of n elements; beyond kLargeAngle libm's.
template <bool Cosine>
inline void sines(long n, const float* __restrict x, float* __restrict y) {
    int large = 0;
    for (long i = 0; i < n; ++i) {
        float sine, cosine;
        sincos_(x[i], sine, cosine);
        y[i] = Cosine ? cosine : sine;
        large |= abs_(x[i]) > kLargeAngle ? 1 : 0;
    }
    for (long i = 0; large && i < n; ++i)
        if (abs_(x[i]) > kLargeAngle) y[i] = Cosine ? __builtin_cosf(x[i]) : __builtin_sinf(x[i]);
}
template <bool Cosine>
inline void sines(long n, const double* __restrict x, double* __restrict y) {
    for (long i = 0; i < n; ++i) y[i] = Cosine ? __builtin_cos(x[i]) : __builtin_sin(x[i]);
}

template <class S, class F>
inline void map_block(long n, const S* __restrict a, S* __restrict y, F f) {
    for (long i = 0; i < n; ++i) y[i] = f(a[i]);
}
// ka, kb: whether a and b are one number for all elements.
template <class S, class F>
inline void map_block(long n, const S* __restrict a, bool ka, const S* __restrict b, bool kb, S* __restrict y, F f) {
    if (kb) {
        const S v = *b;
        for (long i = 0; i < n; ++i) y[i] = f(a[i], v);
    } else if (ka) {
        const S u = *a;
        for (long i = 0; i < n; ++i) y[i] = f(u, b[i]);
    } else {
        for (long i = 0; i < n; ++i) y[i] = f(a[i], b[i]);
    }
}

// Whether an operand of a primitive may be one number in place of a block.
constexpr bool takes_number(Primitive p) {
    return p == Primitive::add || p == Primitive::sub || p == Primitive::mul || p == Primitive::div ||
           p == Primitive::minimum || p == Primitive::maximum || p == Primitive::lt || p == Primitive::le ||
           p == Primitive::eq;
}

// place(i) is where n elements of place i are, or one number for all of them where `alike` is set.
template <class S, class P>
void step_block(const Step& step, long n, P place, const bool* alike = nullptr) {
    const bool ka = alike && alike[step.a], kb = alike && step.b >= 0 && alike[step.b];
    const S *a = place(step.a), *b = step.b < 0 ? a : place(step.b), *c = step.c < 0 ? a : place(step.c);
    S* y = place(step.out);
    switch (step.primitive) {
        case Primitive::add:
            return map_block<S>(n, a, ka, b, kb, y, [](S u, S v) { return u + v; });
        case Primitive::sub:
            return map_block<S>(n, a, ka, b, kb, y, [](S u, S v) { return u - v; });
        case Primitive::mul:
            return map_block<S>(n, a, ka, b, kb, y, [](S u, S v) { return u * v; });
        case Primitive::div:
            return map_block<S>(n, a, ka, b, kb, y, [](S u, S v) { return u / v; });
        case Primitive::neg:
            return map_block<S>(n, a, y, [](S u) { return -u; });
        case Primitive::abs:
            return map_block<S>(n, a, y, [](S u) { return abs_(u); });
        case Primitive::sign:
            return map_block<S>(n, a, y, [](S u) { return sign_(u); });
        case Primitive::exp:
            return map_block<S>(n, a, y, [](S u) { return exp_(u); });
        case Primitive::expm1:
            return map_block<S>(n, a, y, [](S u) { return expm1_(u); });
        case Primitive::log:
            return map_block<S>(n, a, y, [](S u) { return log_(u); });
        case Primitive::log1p:
            return map_block<S>(n, a, y, [](S u) { return log1p_(u); });
        case Primitive::sqrt:
            return map_block<S>(n, a, y, [](S u) { return sqrt_(u); });
        case Primitive::sin:
            return sines<false>(n, a, y);
        case Primitive::cos:
            return sines<true>(n, a, y);
        case Primitive::tanh:
            return map_block<S>(n, a, y, [](S u) { return tanh_(u); });
        case Primitive::sigmoid:
            return map_block<S>(n, a, y, [](S u) { return S(1) / (S(1) + exp_(-u)); });
        case Primitive::erf:
            return map_block<S>(n, a, y, [](S u) { return erf_(u); });
        case Primitive::pow:
            return map_block<S>(n, a, ka, b, kb, y, [](S u, S v) { return pow_(u, v); });
        case Primitive::fmod:
            return map_block<S>(n, a, ka, b, kb, y, [](S u, S v) { return fmod_(u, v); });
        case Primitive::floor:
            return map_block<S>(n, a, y, [](S u) { return floor_(u); });
        case Primitive::ceil:
            return map_block<S>(n, a, y, [](S u) { return ceil_(u); });
        case Primitive::round:
            return map_block<S>(n, a, y, [](S u) { return round_(u); });
        case Primitive::trunc:
            return map_block<S>(n, a, y, [](S u) { return trunc_(u); });
        case Primitive::minimum:
            return map_block<S>(n, a, ka, b, kb, y, [](S u, S v) { return u < v || u != u ? u : v; });
        case Primitive::maximum:
            return map_block<S>(n, a, ka, b, kb, y, [](S u, S v) { return u > v || u != u ? u : v; });
        case Primitive::lt:
            return map_block<S>(n, a, ka, b, kb, y, [](S u, S v) { return u < v ? S(1) : S(0); });
        case Primitive::le:
            return map_block<S>(n, a, ka, b, kb, y, [](S u, S v) { return u <= v ? S(1) : S(0); });
        case Primitive::eq:
            return map_block<S>(n, a, ka, b, kb, y, [](S u, S v) { return u == v ? S(1) : S(0); });
        case Primitive::where:
            for (long i = 0; i < n; ++i) y[i] = a[i] != S(0) ? b[i] : c[i];
            return;
    }
}
