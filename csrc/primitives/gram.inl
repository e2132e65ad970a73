// Inner products of few rows with many: sums along vectors, of which no lane is wasted.

constexpr int kGramRows = kWide ? 3 : 2, kGramColumns = 5;

// Whether x qᵀ with so few rows of q is faster this way than as a product, whose vectors lie along them.
template <class S>
constexpr bool is_few(long rows) {
    return 4 * rows <= 3 * lanes<S>;
}

// R rows of x by C rows of q, all K numbers long.
template <class S, int R, int C>
inline void gram_tile(long K, const S* x, const S* q, S scale, S* g, long ld) {
    constexpr int L = lanes<S>, kSums = (R * C + L - 1) / L * L;
    vec<S> sums[kSums] = {};
    auto add = [&](long k, auto read) {
        vec<S> qk[C];
#pragma GCC unroll 8
        for (int j = 0; j < C; ++j) qk[j] = read(q + j * K + k);
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
            vec<S> xk = read(x + i * K + k);
#pragma GCC unroll 8
            for (int j = 0; j < C; ++j) sums[i * C + j] += xk * qk[j];
        }
    };
    long k = 0;
    for (; k + L <= K; k += L) add(k, [](const S* p) { return load(p); });
    if (k < K) add(k, [edge = EdgeOf<S>(K - k)](const S* p) { return load_edge(p, edge); });
    S scaled[kSums];
    for (int i = 0; i < kSums; i += L) store(scaled + i, sum_each<S>(sums + i) * scale);
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < C; ++j) g[i * ld + j] = scaled[i * C + j];
}

template <class S, int C>
inline void gram_columns(long M, long K, const S* x, const S* q, S scale, S* g, long ld) {
    long i = 0;
    for (; i + kGramRows <= M; i += kGramRows) gram_tile<S, kGramRows, C>(K, x + i * K, q, scale, g + i * ld, ld);
    for (; i < M; ++i) gram_tile<S, 1, C>(K, x + i * K, q, scale, g + i * ld, ld);
}

template <class S, int... C>
inline auto pick_gram(long columns, Heights<C...>) {
    static constexpr decltype(&gram_columns<S, 1>) table[] = {gram_columns<S, C + 1>...};
    return table[columns - 1];
}

// g (M × N) = scale x qᵀ for x (M × K), q (N × K).
template <class S>
__attribute__((noinline)) void gram(long M, long N, long K, const S* x, const S* q, S scale, S* g) {
    each_block(N, kGramColumns, [=](long j, long end) {
        pick_gram<S>(end - j, HeightsTo<kGramColumns>{})(M, K, x, q + j * K, scale, g + j, N);
    });
}
