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

// δyᵀ x over rows of both.
template <class S>
struct Outer {
    long rows = 0;
    const S *dy = nullptr, *x = nullptr;
};

// ∇W = source + scale (δyᵀ x + δzᵀ z), or without the source; a product without rows is absent.
template <class S>
struct WeightGradient {
    Outer<S> one, two;
    Result<S> to;  // (o, i)

    void operator()(const Op& op, S* scratch) const {
        long I = op.width, O = op.out_width;
        if (2 * I > lanes<S> || O <= I) {
            auto product = [=](const Outer<S>& t) { return Product<S>{t.rows, {t.dy, 1, O}, {t.x, I, false, false}}; };
            return gemm<S>(O, I, product(one), product(two), to, scratch);
        }
        // a narrow input would waste vector lanes: there the transpose is computed
        auto swapped = [=](const Outer<S>& t) { return Product<S>{t.rows, {t.x, 1, I}, {t.dy, O, false, true}}; };
        const Product<S> p = swapped(one), q = swapped(two);
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
    const S *many = flip ? q : x, *few = flip ? x : q;
    S* coefficients = scratch + packed_size(I, N, lanes<S>);
    if (is_few<S>(N)) {
        gram<S>(M, N, I, many, few, c, coefficients);
    } else {
        pack_transposed(I, N, few, scratch);
        gemm<S>(M, N, {I, {many, I, 1}, {scratch, I, true, true}}, {}, {coefficients, N, nullptr, nullptr},
                more_scratch);
        for (long i = 0; i < M * N; ++i) coefficients[i] *= c;
    }
    gemm<S>(rows, O, {rank, {coefficients, flip ? 1 : N, flip ? N : 1}, {p, O, false, owned}}, {}, {y, O, y, nullptr},
            more_scratch);
}
