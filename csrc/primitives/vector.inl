// SIMD vectors as the compilers' own vector types: one source for every instruction set.
// MAML_FAST_BYTES is the register width in bytes, MAML_FAST_ROWS the tile height it affords.

// Of functions in loops that are to become vector code, which one call would prevent.
#define MAML_FAST_INLINED __attribute__((always_inline)) inline

template <class S>
struct Vector;

template <>
struct Vector<float> {
    typedef float type __attribute__((vector_size(MAML_FAST_BYTES)));
};

template <>
struct Vector<double> {
    typedef double type __attribute__((vector_size(MAML_FAST_BYTES)));
};

template <class S>
using vec = typename Vector<S>::type;

template <class S>
constexpr long lanes = MAML_FAST_BYTES / sizeof(S);

template <class S>
inline vec<S> load(const S* p) {
    vec<S> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

template <class S>
inline void store(S* p, vec<S> v) {
    __builtin_memcpy(p, &v, sizeof v);
}

template <class T>
inline T least(T a, T b) {
    return a < b ? a : b;
}

inline long ceil_div(long a, long b) { return (a + b - 1) / b; }

// The integers 0 … N − 1 as a type, for tables of template instances.
template <int... I>
struct Heights {};
template <int N, int... I>
struct MakeHeights : MakeHeights<N - 1, N - 1, I...> {};
template <int... I>
struct MakeHeights<0, I...> {
    using type = Heights<I...>;
};
template <int N>
using HeightsTo = typename MakeHeights<N>::type;

// ---- loops over channels, a vector at a time and one by one at the end -----------------------------
// f(w, c) is written once for both: `w` says which, get(w, p), set(w, p, x) and splat(w, s) follow it.

template <class S>
struct Wide {
    using type = vec<S>;
    using scalar = S;
};
template <class S>
struct Narrow {
    using type = S;
    using scalar = S;
};

template <class S>
inline vec<S> get(Wide<S>, const S* p) {
    return load(p);
}
template <class S>
inline S get(Narrow<S>, const S* p) {
    return *p;
}
template <class S>
inline void set(Wide<S>, S* p, vec<S> x) {
    store(p, x);
}
template <class S>
inline void set(Narrow<S>, S* p, S x) {
    *p = x;
}
template <class S>
inline vec<S> splat(Wide<S>, S x) {
    return vec<S>{} + x;
}
template <class S>
inline S splat(Narrow<S>, S x) {
    return x;
}

template <class S, class F>
inline void each_lane(long C, F f) {
    long c = 0;
    for (; c + lanes<S> <= C; c += lanes<S>) f(Wide<S>{}, c);
    for (; c < C; ++c) f(Narrow<S>{}, c);
}
