// The first `columns` lanes of a vector: a ragged edge must not touch what lies behind it.

#if MAML_FAST_BYTES == 64 && defined(__AVX512F__)

// Masked loads and stores cost what whole ones do: operands with a ragged edge need no packing.
template <class S>
constexpr bool kMaskedEdges = true;

template <class S>
struct EdgeOf {
    unsigned mask;

    explicit EdgeOf(long columns) : mask((1u << least(columns > 0 ? columns : 0L, lanes<S>)) - 1) {}
};

inline vec<float> load_edge(const float* p, EdgeOf<float> edge) {
    return (vec<float>)_mm512_maskz_loadu_ps(__mmask16(edge.mask), p);
}
inline vec<double> load_edge(const double* p, EdgeOf<double> edge) {
    return (vec<double>)_mm512_maskz_loadu_pd(__mmask8(edge.mask), p);
}
inline void store_edge(float* p, vec<float> v, EdgeOf<float> edge) {
    _mm512_mask_storeu_ps(p, __mmask16(edge.mask), (__m512)v);
}
inline void store_edge(double* p, vec<double> v, EdgeOf<double> edge) {
    _mm512_mask_storeu_pd(p, __mmask8(edge.mask), (__m512d)v);
}

#else

template <class S>
constexpr bool kMaskedEdges = false;

template <class S>
struct EdgeOf {
    long columns;

    explicit EdgeOf(long n) : columns(least(n, lanes<S>)) {}
};

template <class S>
inline vec<S> load_edge(const S* p, EdgeOf<S> edge) {
    vec<S> v{};
    for (long i = 0; i < edge.columns; ++i) v[i] = p[i];
    return v;
}

template <class S>
inline void store_edge(S* p, vec<S> v, EdgeOf<S> edge) {
    for (long i = 0; i < edge.columns; ++i) p[i] = v[i];
}

#endif
