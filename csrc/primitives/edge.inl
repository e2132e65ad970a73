// The first `columns` lanes of a vector: a ragged edge must not touch what lies behind it.

#if MAML_FAST_BYTES == 64 && defined(__AVX512F__)

// Masked loads and stores cost what whole ones do: operands with a ragged edge need no packing.
template <class S>
constexpr bool kMaskedEdges = true;

inline unsigned edge_mask(long columns, long width) {
    return columns >= width ? (1u << width) - 1 : columns > 0 ? (1u << columns) - 1 : 0;
}
inline vec<float> load_edge(const float* p, long columns) {
    return (vec<float>)_mm512_maskz_loadu_ps(__mmask16(edge_mask(columns, 16)), p);
}
inline vec<double> load_edge(const double* p, long columns) {
    return (vec<double>)_mm512_maskz_loadu_pd(__mmask8(edge_mask(columns, 8)), p);
}
inline void store_edge(float* p, vec<float> v, long columns) {
    _mm512_mask_storeu_ps(p, __mmask16(edge_mask(columns, 16)), (__m512)v);
}
inline void store_edge(double* p, vec<double> v, long columns) {
    _mm512_mask_storeu_pd(p, __mmask8(edge_mask(columns, 8)), (__m512d)v);
}

#else

template <class S>
constexpr bool kMaskedEdges = false;

template <class S>
inline vec<S> load_edge(const S* p, long columns) {
    vec<S> v{};
    for (long i = 0; i < columns && i < lanes<S>; ++i) v[i] = p[i];
    return v;
}

template <class S>
inline void store_edge(S* p, vec<S> v, long columns) {
    for (long i = 0; i < columns && i < lanes<S>; ++i) p[i] = v[i];
}

#endif
