// Sums in a fixed order that vectorises: sixteen running sums, then a fixed tree.

template <class S, class F>
inline S sum_of(long n, F term) {
    constexpr long kSums = 16;
    S sums[kSums] = {};
    long i = 0;
    for (; i + kSums <= n; i += kSums)
        for (long j = 0; j < kSums; ++j) sums[j] += term(i + j);
    for (; i < n; ++i) sums[0] += term(i);
    for (long width = kSums / 2; width > 0; width /= 2)
        for (long j = 0; j < width; ++j) sums[j] += sums[j + width];
    return sums[0];
}

template <class S>
inline void fill(S* p, long n, S value) {
    for (long i = 0; i < n; ++i) p[i] = value;
}

template <class S>
inline void copy(const S* __restrict from, S* __restrict to, long n) {
    for (long i = 0; i < n; ++i) to[i] = from[i];
}

// to = value(i) if `first` writer, to += value(i) otherwise.
template <class S, class F>
inline void put(bool first, S* __restrict to, long n, F value) {
    if (first)
        for (long i = 0; i < n; ++i) to[i] = value(i);
    else
        for (long i = 0; i < n; ++i) to[i] += value(i);
}

// sums[i] (+)= Σ_rows m[row][i].
template <class S>
inline void column_sums(bool first, long rows, long columns, const S* __restrict m, S* __restrict sums) {
    if (first) fill(sums, columns, S(0));
    for (long r = 0; r < rows; ++r)
        for (long i = 0; i < columns; ++i) sums[i] += m[r * columns + i];
}
