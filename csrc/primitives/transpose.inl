// Transposes in registers, a square of one vector's width at a time.

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

// A transpose that adds what it would put side by side: 2·Step rows become Step.
template <class S, int Step>
inline void fold(vec<S>* rows) {
    if constexpr (Step > 0) {
#pragma GCC unroll 32
        for (int i = 0; i < Step; ++i) {
            exchange<Step>(rows[i], rows[i + Step], HeightsTo<lanes<S>>{});
            rows[i] += rows[i + Step];
        }
        fold<S, Step / 2>(rows);
    }
}
#endif

// to[j·to_ld + i] = from[i·from_ld + j] for i < rows, j < columns, both at most a vector's width; rows of `to` are
// whole vectors, zero from `rows` on.
template <class S>
inline void transpose_block(long rows, long columns, const S* from, long from_ld, S* to, long to_ld) {
    constexpr int L = lanes<S>;
#ifdef MAML_FAST_SHUFFLE
    const EdgeOf<S> edge(columns);
    vec<S> block[L];
#pragma GCC unroll 32
    for (int i = 0; i < L; ++i) block[i] = i < rows ? load_edge(from + i * from_ld, edge) : vec<S>{};
    exchange_all<S, L / 2>(block);
#pragma GCC unroll 32
    for (int j = 0; j < L; ++j)
        if (j < columns) store(to + j * to_ld, block[j]);
#else
    for (long j = 0; j < columns; ++j)
        for (long i = 0; i < L; ++i) to[j * to_ld + i] = i < rows ? from[i * from_ld + j] : S(0);
#endif
}

// The same for a whole square.
template <class S>
inline void transpose_block(const S* from, long from_ld, S* to, long to_ld) {
    constexpr int L = lanes<S>;
#ifdef MAML_FAST_SHUFFLE
    vec<S> block[L];
#pragma GCC unroll 32
    for (int i = 0; i < L; ++i) block[i] = load(from + i * from_ld);
    exchange_all<S, L / 2>(block);
#pragma GCC unroll 32
    for (int j = 0; j < L; ++j) store(to + j * to_ld, block[j]);
#else
    for (int j = 0; j < L; ++j)
        for (int i = 0; i < L; ++i) to[j * to_ld + i] = from[i * from_ld + j];
#endif
}

// Lane i of the result is the sum of all lanes of rows[i].
template <class S>
inline vec<S> sum_each(vec<S>* rows) {
    constexpr int L = lanes<S>;
#ifdef MAML_FAST_SHUFFLE
    fold<S, L / 2>(rows);
    return rows[0];
#else
    vec<S> sums;
    for (int i = 0; i < L; ++i) {
        S sum = rows[i][0];
        for (int j = 1; j < L; ++j) sum += rows[i][j];
        sums[i] = sum;
    }
    return sums;
#endif
}
