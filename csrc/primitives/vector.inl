// SIMD vectors as the compilers' own vector types: one source for every instruction set.
// MAML_FAST_BYTES is the register width in bytes, MAML_FAST_ROWS the tile height it affords.

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

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define MAML_FAST_SHUFFLE
#endif
#endif

#ifdef MAML_FAST_SHUFFLE
// Swaps the off-diagonal halves of every 2·Step square that rows a and b cut.
template <int Step, class V, int... J>
inline void exchange(V& a, V& b, Heights<J...>) {
    constexpr int L = sizeof...(J);
    V low = __builtin_shufflevector(a, b, ((J & Step) ? L + J - Step : J)...);
    b = __builtin_shufflevector(a, b, ((J & Step) ? L + J : J + Step)...);
    a = low;
}

template <class S, int Step>
inline void exchange_all(vec<S>* rows) {
    constexpr int L = lanes<S>;
    if constexpr (Step > 0) {
#pragma GCC unroll 32
        for (int i = 0; i < L; ++i)
            if (!(i & Step)) exchange<Step>(rows[i], rows[i + Step], HeightsTo<L>{});
        exchange_all<S, Step / 2>(rows);
    }
}
#endif

// to[i·to_ld + j] = from[j·from_ld + i] for a square of one vector's width.
template <class S>
inline void transpose_block(const S* from, long from_ld, S* to, long to_ld) {
    constexpr int L = lanes<S>;
#ifdef MAML_FAST_SHUFFLE
    vec<S> rows[L];
#pragma GCC unroll 32
    for (int i = 0; i < L; ++i) rows[i] = load(from + i * from_ld);
    exchange_all<S, L / 2>(rows);
#pragma GCC unroll 32
    for (int i = 0; i < L; ++i) store(to + i * to_ld, rows[i]);
#else
    for (int i = 0; i < L; ++i)
        for (int j = 0; j < L; ++j) to[i * to_ld + j] = from[j * from_ld + i];
#endif
}

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
