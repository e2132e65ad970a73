// y = x Wᵀ + b over rows (samples, or samples × positions); W is (o, i) row-major as in PyTorch.
//   δx = δy W            ∇W = δyᵀ x          ∇b = Σ δy
//   ẏ  = ẋ Wᵀ + x Vᵀ + v_b
//   δ̇x = δ̇y W + δy V     ∇W˙ = δ̇yᵀ x + δyᵀ ẋ     ∇b˙ = Σ δ̇y

// y (+)= x Wᵀ (+ b); `panels` is Wᵀ packed.
template <class S>
void linear_forward(const Op& op, long rows, const S* x, const S* panels, const S* bias, bool add, S* y, S* scratch) {
    long I = op.width, O = op.out_width;
    gemm<S>(rows, O, I, {x, I, 1}, {panels, 0, true, true}, {y, O, S(1), add ? y : nullptr, bias}, scratch);
}

// δx (+)= δy W; `packed` says whether `w` is panels or the weight itself.
template <class S>
void linear_backward(const Op& op, bool first, long rows, const S* dy, const S* w, bool packed, S* dx, S* scratch) {
    long I = op.width, O = op.out_width;
    gemm<S>(rows, I, O, {dy, O, 1}, {w, I, packed, false}, {dx, I, S(1), first ? nullptr : dx, nullptr}, scratch);
}

// ∇W (+)= δyᵀ x. A narrow input would waste vector lanes, so there the transpose is computed.
template <class S>
void linear_weight_gradient(const Op& op, bool first, long rows, const S* dy, const S* x, S* dw, S* scratch) {
    long I = op.width, O = op.out_width;
    if (2 * I > lanes<S> || O <= I) {
        gemm<S>(O, I, rows, {dy, 1, O}, {x, I, false, false}, {dw, I, S(1), first ? nullptr : dw, nullptr}, scratch);
        return;
    }
    S* transposed = scratch;
    gemm<S>(I, O, rows, {x, 1, I}, {dy, O, false, true}, {transposed, O, S(1), nullptr, nullptr}, scratch + I * O);
    for (long o = 0; o < O; ++o)
        for (long i = 0; i < I; ++i) {
            S g = transposed[i * O + o];
            dw[o * I + i] = first ? g : dw[o * I + i] + g;
        }
}
