// y = x Wᵀ + b over rows (samples, or samples × positions); W is (o, i) row-major as in PyTorch.
//   δx = δy W            ∇W = δyᵀ x          ∇b = Σ δy
//   ẏ  = ẋ Wᵀ + x Vᵀ + v_b
//   δ̇x = δ̇y W + δy V     ∇W˙ = δ̇yᵀ x + δyᵀ ẋ     ∇b˙ = Σ δ̇y

// y = x Wᵀ + b, or y += x Wᵀ (then without bias).
template <class S>
void linear_forward(const Op& op, long rows, const S* x, const Right<S>& transposed, const S* bias, bool add, S* y,
                    S* scratch) {
    long I = op.width, O = op.out_width;
    gemm<S>(rows, O, I, {x, I, 1}, transposed, {y, O, add ? y : nullptr, bias}, scratch);
}

// δx (+)= δy W; `packed` says whether `w` is panels or the weight itself.
template <class S>
void linear_backward(const Op& op, bool first, long rows, const S* dy, const S* w, bool packed, S* dx, S* scratch) {
    long I = op.width, O = op.out_width;
    gemm<S>(rows, I, O, {dy, O, 1}, {w, packed ? O : I, packed, false}, {dx, I, first ? nullptr : dx, nullptr},
            scratch);
}

// ∇W (+)= δyᵀ x. A narrow input would waste vector lanes, so there the transpose is computed.
template <class S>
void linear_weight_gradient(const Op& op, bool first, long rows, const S* dy, const S* x, S* dw, S* scratch) {
    long I = op.width, O = op.out_width;
    if (2 * I > lanes<S> || O <= I) {
        gemm<S>(O, I, rows, {dy, 1, O}, {x, I, false, false}, {dw, I, first ? nullptr : dw, nullptr}, scratch);
        return;
    }
    S* transposed = scratch;
    gemm<S>(I, O, rows, {x, 1, I}, {dy, O, false, true}, {transposed, O, nullptr, nullptr}, scratch + I * O);
    for (long o = 0; o < O; ++o)
        for (long i = 0; i < I; ++i) {
            S g = transposed[i * O + o];
            dw[o * I + i] = first ? g : dw[o * I + i] + g;
        }
}

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
    gemm<S>(M, N, I, {flip ? q : x, I, 1}, {panels, I, true, true}, {gram, N, nullptr, nullptr}, more_scratch);
    for (long i = 0; i < M * N; ++i) gram[i] *= c;
    gemm<S>(rows, O, rank, {gram, flip ? 1 : N, flip ? N : 1}, {p, O, false, owned}, {y, O, y, nullptr}, more_scratch);
}
