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

inline long ceil_div(long a, long b) {
    return (a + b - 1) / b;
}
