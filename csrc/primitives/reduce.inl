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

// to[i] = from[i] + scale Σ_rows m[row][i], row after row; from null is zero. A few vectors side by side hide each
// other's latency.
template <class S>
inline void column_sums(long rows, long columns, const S* m, const S* from, S scale, S* to) {
    constexpr long L = lanes<S>, kAbreast = 4;
    auto few_vectors = [=](long first, auto read, auto write) {
        vec<S> sum[kAbreast] = {};
        for (long r = 0; r < rows; ++r)
            for (long v = 0; v < kAbreast; ++v) sum[v] += read(m + r * columns + first, v);
        for (long v = 0; v < kAbreast; ++v)
            write(to + first, v, from ? read(from + first, v) + scale * sum[v] : scale * sum[v]);
    };
    long done = 0;
    for (; done + kAbreast * L <= columns; done += kAbreast * L)
        few_vectors(
            done, [](const S* p, long v) { return load(p + v * L); },
            [](S* p, long v, vec<S> x) { store(p + v * L, x); });
    if constexpr (kMaskedEdges<S>) {
        auto edge = [=](long v) { return EdgeOf<S>(columns - done - v * L); };
        if (done < columns)
            few_vectors(
                done, [=](const S* p, long v) { return load_edge(p + v * L, edge(v)); },
                [=](S* p, long v, vec<S> x) { store_edge(p + v * L, x, edge(v)); });
        return;
    }
    each_lane<S>(columns - done, [=](auto w, long j) {
        long i = done + j;
        auto sum = splat(w, S(0));
        for (long r = 0; r < rows; ++r) sum += get(w, m + r * columns + i);
        set(w, to + i, from ? get(w, from + i) + scale * sum : scale * sum);
    });
}
