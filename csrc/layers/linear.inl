// y = x Wᵀ + b over rows (samples, or samples × positions); W is (o, i) row-major as in PyTorch.
//   δx = δy W            ∇W = δyᵀ x          ∇b = Σ δy
//   ẏ  = ẋ Wᵀ + x Vᵀ + v_b
//   δ̇x = δ̇y W + δy V     ∇W˙ = δ̇yᵀ x + δyᵀ ẋ     ∇b˙ = Σ δ̇y

// x Wᵀ, given Wᵀ.
template <class S>
Product<S> forward_term(const Op& op, const S* x, const Right<S>& transposed) {
    return {op.width, {x, op.width, 1}, transposed};
}

// δy W.
template <class S>
Product<S> backward_term(const Op& op, const S* dy, const Right<S>& w) {
    return {op.out_width, {dy, op.out_width, 1}, w};
}

// ∇W = source + scale (δyᵀ x + δzᵀ z), or without the source; the second product is absent where z is null.
template <class S>
struct WeightGradient {
    long rows;
    const S *dy, *x, *dz, *z;
    Result<S> to;  // (o, i)

    void operator()(const Op& op, S* scratch) const {
        long I = op.width, O = op.out_width, more = z ? rows : 0;
        if (2 * I > lanes<S> || O <= I) {
            gemm<S>(O, I, {rows, {dy, 1, O}, {x, I, false, false}}, {more, {dz, 1, O}, {z, I, false, false}}, to,
                    scratch);
            return;
        }
        // a narrow input would waste vector lanes: there the transpose is computed
        const Product<S> p{rows, {x, 1, I}, {dy, O, false, true}}, q{more, {z, 1, I}, {dz, O, false, true}};
        if (I == 1) return gemm<S>(I, O, p, q, {to.p, O, to.source, nullptr, to.scale}, scratch);
        S* transposed = scratch;
        gemm<S>(I, O, p, q, {transposed, O, nullptr, nullptr}, scratch + I * O);
        for (long o = 0; o < O; ++o)
            for (long i = 0; i < I; ++i) {
                S g = to.scale * transposed[i * O + o];
                to.p[o * I + i] = to.source ? to.source[o * I + i] + g : g;
            }
    }
};

// y += c (x qᵀ) p for x (rows, i), q (rank, i), p (rank, o), y (rows, o). `owned`: p lies in the
// workspace, where reading a little past its end is allowed.
template <class S>
void low_rank_product(long rows, long I, long O, long rank, S c, const S* x, const S* q, const S* p, bool owned, S* y,
                      S* scratch, S* more_scratch) {
    // the smaller of x and q is the one worth transposing
    bool flip = rank > rows;
    long M = flip ? rank : rows, N = flip ? rows : rank;
    S *panels = scratch, *gram = scratch + packed_size(I, N, lanes<S>);
    pack_transposed(I, N, flip ? x : q, panels);
    gemm<S>(M, N, {I, {flip ? q : x, I, 1}, {panels, I, true, true}}, {}, {gram, N, nullptr, nullptr}, more_scratch);
    for (long i = 0; i < M * N; ++i) gram[i] *= c;
    gemm<S>(rows, O, {rank, {gram, flip ? 1 : N, flip ? N : 1}, {p, O, false, owned}}, {}, {y, O, y, nullptr},
            more_scratch);
}
