// Part of Engine: operations of families: parameters as values, expressions, linear maps, products of activations.

// Samples of a buffer's tasks.
long held(const TapeView& tape, int buffer) const { return plan_.once[buffer] ? 1 : samples(tape); }

// ---- values of a task -----------------------------------------------------------------------------

void spread_parameter(PerTask<const S> w, long size, S* y) const {
    for (long b = 0; b < B_; ++b) copy(w.of(b), y + b * size, size);
}

void add_parameter_gradient(PerTask<S> to, bool first, long size, const S* dy) const {
    for (long b = 0; to && b < B_; ++b) {
        const S* from = dy + b * size;
        put(first, to.of(b), size, [=](long i) { return from[i]; });
    }
}

// ---- expressions ----------------------------------------------------------------------------------

// What an expression reads at one of its places: null where it reads nothing, or zeros.
using Places = const S * [2 * kMostOperands + 2];

// A run of an operand's elements that lies along the output's last axis: f(offset, count, stride, elements before it).
template <class F>
void each_run(const Pointwise& p, int operand, long features, long sample_stride, long start, long n, F f) const {
    const long inner = p.sizes[p.axes - 1], stride = p.strides[operand][p.axes - 1];
    for (long done = 0; done < n;) {
        const long e = start + done, sample = e / features, column = e % inner;
        long row = e % features / inner, offset = sample * sample_stride + column * stride;
        for (int axis = p.axes - 2; axis >= 0; --axis) {
            offset += row % p.sizes[axis] * p.strides[operand][axis];
            row /= p.sizes[axis];
        }
        const long count = least(inner - column, n - done);
        f(offset, count, stride, done);
        done += count;
    }
}

// Computes an expression for all elements of the block's tasks; write(output, task, first element, elements, values).
template <class F>
void compute(const Op& op, const TapeView& tape, const Expression& e, const Places& read, F write) const {
    const Pointwise& p = *op.pointwise;
    const long features = plan_.features[op.out], total = samples(tape) * features;
    S* memory = ws_ + plan_.blocks_scratch;
    const int constants = first_constant(p);
    for (int i = 0; i < e.n_constants; ++i)
        fill(memory + (constants + i) * kPointwiseBlock, kPointwiseBlock, S(e.constants[i]));
    for (int i = 0; i < constants; ++i)
        if (!read[i]) fill(memory + i * kPointwiseBlock, kPointwiseBlock, S(0));
    for (long b = 0; b < B_; ++b)
        for (long start = 0; start < total; start += kPointwiseBlock) {
            const long n = least(kPointwiseBlock, total - start);
            S* at[2 * kMostOperands + 2];
            for (int i = 0; i < constants; ++i) at[i] = operand_block(op, tape, i, read[i], b, start, n, memory);
            auto place = [&](int i) { return i < constants ? at[i] : memory + i * kPointwiseBlock; };
            for (const Step* s = e.steps; s < e.steps + e.n_steps; ++s) step_block<S>(*s, n, place);
            for (int o = 0; o < e.n_outputs; ++o) write(o, b, start, n, place(e.outputs[o]));
        }
}

// Where n elements of place i are, in the order of the output's; copied where the operand is broadcast.
S* operand_block(const Op& op, const TapeView& tape, int i, const S* from, long b, long start, long n,
                 S* memory) const {
    const Pointwise& p = *op.pointwise;
    S* copied = memory + i * kPointwiseBlock;
    if (!from) return copied;
    const long features = plan_.features[op.out], total = samples(tape) * features;
    if (i >= 2 * p.operands) return const_cast<S*>(from) + b * total + start;
    const int j = i % p.operands, buffer = op.in[j];
    const long size = plan_.features[buffer], stride = plan_.once[buffer] ? 0 : size;
    from += b * held(tape, buffer) * size;
    if (p.whole[j] && (stride || samples(tape) == 1)) return const_cast<S*>(from) + start;
    each_run(p, j, features, stride, start, n, [=](long offset, long count, long step, long done) {
        const S* run = from + offset;
        if (step == 1)
            copy(run, copied + done, count);
        else
            for (long k = 0; k < count; ++k) copied[done + k] = run[k * step];
    });
    return copied;
}

// Adds n elements of an operand's delta to it.
void add_block(const Op& op, const TapeView& tape, int j, bool first, long b, long start, long n, const S* values,
               S* to) const {
    const Pointwise& p = *op.pointwise;
    const int buffer = op.in[j];
    const long features = plan_.features[op.out], size = plan_.features[buffer];
    const long stride = plan_.once[buffer] ? 0 : size;
    to += b * held(tape, buffer) * size;
    if (p.whole[j] && (stride || samples(tape) == 1))
        return put(first, to + start, n, [=](long i) { return values[i]; });
    if (first && start == 0) fill(to, held(tape, buffer) * size, S(0));
    each_run(p, j, features, stride, start, n, [=](long offset, long count, long step, long done) {
        const S* run = values + done;
        if (step == 0)
            to[offset] += sum_of<S>(count, [=](long k) { return run[k]; });
        else
            for (long k = 0; k < count; ++k) to[offset + k * step] += run[k];
    });
}

void read_values(const Op& op, const TapeView& tape, Places& read) const {
    for (int j = 0; j < op.n_in; ++j) read[j] = value(tape, op.in[j]);
}

void read_tangents(const Op& op, Places& read) const {
    for (int j = 0; j < op.n_in; ++j) read[tangent_place(*op.pointwise, j)] = tangent(op, j);
}

void pointwise_values(const Op& op, const TapeView& tape, const Expression& e, const Places& read, S* y) const {
    const long total = samples(tape) * plan_.features[op.out];
    compute(op, tape, e, read,
            [=](int, long b, long start, long n, const S* values) { copy(values, y + b * total + start, n); });
}

// delta(j) is where the j-th operand's goes, null where none is wanted.
template <class F>
void pointwise_deltas(const Op& op, const TapeView& tape, const Expression& e, const Places& read, F delta) const {
    compute(op, tape, e, read, [&](int j, long b, long start, long n, const S* values) {
        if (S* to = delta(j)) add_block(op, tape, j, op.delta_first[j], b, start, n, values, to);
    });
}

void pointwise_forward(const Op& op, const TapeView& tape, S* y) const {
    Places read{};
    read_values(op, tape, read);
    pointwise_values(op, tape, op.pointwise->value, read, y);
}

void pointwise_tangent(const Op& op, const TapeView& tape, S* ty) const {
    Places read{};
    read_values(op, tape, read);
    read_tangents(op, read);
    pointwise_values(op, tape, op.pointwise->tangent, read, ty);
}

template <class F>
void pointwise_backward(const Op& op, const TapeView& tape, const S* dy, F delta) const {
    Places read{};
    read_values(op, tape, read);
    read[delta_place(*op.pointwise)] = dy;
    pointwise_deltas(op, tape, op.pointwise->backward, read, delta);
}

template <class F>
void pointwise_backward_tangent(const Op& op, const TapeView& tape, const S* dy, const S* ey, F delta) const {
    Places read{};
    read_values(op, tape, read);
    read_tangents(op, read);
    read[delta_place(*op.pointwise)] = dy;
    read[tangent_delta_place(*op.pointwise)] = ey;
    pointwise_deltas(op, tape, op.pointwise->backward_tangent, read, delta);
}

// ---- linear maps ----------------------------------------------------------------------------------

S map_factor(const Op& op, const TapeView& tape) const { return op.map->mean ? S(1) / S(tape.samples) : S(1); }

// y = Σ_j A_j x_j; input(j) may be null, for zeros. Where y has no sample axis, those of x are summed over theirs.
template <class F>
void map_values(const Op& op, const TapeView& tape, F input, S* y) const {
    const long size = plan_.features[op.out], outer = held(tape, op.out);
    bool assigns = op.map->assigns;
    for (int j = 0; j < op.n_in; ++j) assigns = assigns && input(j) && held(tape, op.in[j]) <= outer;
    if (!assigns) fill(y, B_ * outer * size, S(0));
    for (const Box* box = op.map->boxes; box < op.map->boxes + op.map->n_boxes; ++box) {
        const S* x = input(box->input);
        if (!x) continue;
        each_copy(op, tape, box->input,
                  [&](long in, long out) { copy_box(*box, false, map_factor(op, tape), !assigns, x + in, y + out); });
    }
}

// δx_j (+)= A_jᵀ δy.
template <class F>
void map_deltas(const Op& op, const TapeView& tape, const S* dy, F delta) const {
    for (int j = 0; j < op.n_in; ++j) {
        S* dx = delta(j);
        if (!dx) continue;
        const long size = plan_.features[op.in[j]], outer = held(tape, op.in[j]);
        const bool assigns = op.delta_first[j] && op.map->assigns_transposed[j] && held(tape, op.out) <= outer;
        if (op.delta_first[j] && !assigns) fill(dx, B_ * outer * size, S(0));
        for (const Box* box = op.map->boxes; box < op.map->boxes + op.map->n_boxes; ++box) {
            if (box->input != j) continue;
            each_copy(op, tape, j, [&](long in, long out) {
                copy_box(*box, true, map_factor(op, tape), !assigns, dy + out, dx + in);
            });
        }
    }
}

// Calls f(offset in x_j, offset in y) for every sample of every task.
template <class F>
void each_copy(const Op& op, const TapeView& tape, int j, F f) const {
    const long in = held(tape, op.in[j]), out = held(tape, op.out), N = in > out ? in : out;
    const long size_in = plan_.features[op.in[j]], size_out = plan_.features[op.out];
    for (long b = 0; b < B_; ++b)
        for (long n = 0; n < N; ++n) f((b * in + (in > 1 ? n : 0)) * size_in, (b * out + (out > 1 ? n : 0)) * size_out);
}

// ---- products of activations ----------------------------------------------------------------------

// A factor's matrices: for every task, sample and group one of `size` elements.
template <class T>
struct Matrices {
    T* p;
    long task, sample, size;
    T* at(long b, long n, long g) const { return p ? p + b * task + n * sample + g * size : nullptr; }
};

template <class T>
Matrices<T> matrices(const TapeView& tape, int buffer, long size, T* p) const {
    const long features = plan_.features[buffer];
    return {p, held(tape, buffer) * features, plan_.once[buffer] ? 0 : features, size};
}

template <class F>
void each_matrix(const Op& op, const TapeView& tape, F f) const {
    for (long b = 0; b < B_; ++b)
        for (long n = 0; n < samples(tape); ++n)
            for (long g = 0; g < op.groups; ++g) f(b, n, g);
}

// y = a b + c d; a pair may be absent.
void matmul_values(const Op& op, const TapeView& tape, const S* a, const S* b, const S* c, const S* d, S* y) const {
    const long M = op.rows, K = op.width, N = op.out_width;
    auto left_a = matrices(tape, op.in[0], M * K, a), left_c = matrices(tape, op.in[0], M * K, c);
    auto right_b = matrices(tape, op.in[1], K * N, b), right_d = matrices(tape, op.in[1], K * N, d);
    auto to = matrices(tape, op.out, M * N, y);
    const bool padded = op.in[1] != 0;
    if (!(a && b) && !(c && d)) return fill(y, B_ * samples(tape) * plan_.features[op.out], S(0));
    each_matrix(op, tape, [&](long t, long n, long g) {
        auto product = [&](const S* left, const S* right) {
            return left && right ? Product<S>{K, {left, K, 1}, {right, N, false, padded}} : Product<S>{};
        };
        const Product<S> one = product(left_a.at(t, n, g), right_b.at(t, n, g)),
                         two = product(left_c.at(t, n, g), right_d.at(t, n, g));
        const bool both = one.depth > 0;
        gemm<S>(M, N, both ? one : two, both ? two : Product<S>{}, {to.at(t, n, g), N, nullptr, nullptr},
                gemm_scratch());
    });
}

// da (+)= dy bᵀ + dz dᵀ; the second pair may be absent.
void matmul_left_deltas(const Op& op, const TapeView& tape, const S* dy, const S* b, const S* dz, const S* d,
                        S* da) const {
    const long M = op.rows, K = op.width, N = op.out_width, panels = packed_size(N, K, lanes<S>);
    auto dy_ = matrices(tape, op.out, M * N, dy), dz_ = matrices(tape, op.out, M * N, dz);
    auto b_ = matrices(tape, op.in[1], K * N, b), d_ = matrices(tape, op.in[1], K * N, d);
    auto to = matrices(tape, op.in[0], M * K, da);
    S *packed_b = gemm_scratch(), *packed_d = packed_b + panels, *more = packed_d + panels;
    const bool shared = plan_.once[op.in[0]] && !plan_.once[op.out];
    each_matrix(op, tape, [&](long t, long n, long g) {
        auto product = [&](const S* delta, const S* right, S* transposed) {
            if (!delta || !right) return Product<S>{};
            pack_transposed(N, K, right, transposed);
            return Product<S>{N, {delta, N, 1}, {transposed, N, true, true}};
        };
        S* out = to.at(t, n, g);
        const bool add = !op.delta_first[0] || (shared && n > 0);
        gemm<S>(M, K, product(dy_.at(t, n, g), b_.at(t, n, g), packed_b),
                product(dz_.at(t, n, g), d_.at(t, n, g), packed_d), {out, K, add ? out : nullptr, nullptr}, more);
    });
}

// db (+)= aᵀ dy + cᵀ dz; the second pair may be absent.
void matmul_right_deltas(const Op& op, const TapeView& tape, const S* a, const S* dy, const S* c, const S* dz,
                         S* db) const {
    const long M = op.rows, K = op.width, N = op.out_width;
    auto dy_ = matrices(tape, op.out, M * N, dy), dz_ = matrices(tape, op.out, M * N, dz);
    auto a_ = matrices(tape, op.in[0], M * K, a), c_ = matrices(tape, op.in[0], M * K, c);
    auto to = matrices(tape, op.in[1], K * N, db);
    const bool shared = plan_.once[op.in[1]] && !plan_.once[op.out];
    each_matrix(op, tape, [&](long t, long n, long g) {
        auto product = [&](const S* left, const S* delta) {
            return left && delta ? Product<S>{M, {left, 1, K}, {delta, N, false, true}} : Product<S>{};
        };
        S* out = to.at(t, n, g);
        const bool add = !op.delta_first[1] || (shared && n > 0);
        gemm<S>(K, N, product(a_.at(t, n, g), dy_.at(t, n, g)), product(c_.at(t, n, g), dz_.at(t, n, g)),
                {out, N, add ? out : nullptr, nullptr}, gemm_scratch());
    });
}

void matmul_forward(const Op& op, const TapeView& tape, S* y) const {
    matmul_values(op, tape, value(tape, op.in[0]), value(tape, op.in[1]), nullptr, nullptr, y);
}

void matmul_tangent(const Op& op, const TapeView& tape, S* ty) const {
    matmul_values(op, tape, tangent(op, 0), value(tape, op.in[1]), value(tape, op.in[0]), tangent(op, 1), ty);
}

template <class F>
void matmul_backward(const Op& op, const TapeView& tape, const S* dy, F delta) const {
    if (S* da = delta(0)) matmul_left_deltas(op, tape, dy, value(tape, op.in[1]), nullptr, nullptr, da);
    if (S* db = delta(1)) matmul_right_deltas(op, tape, value(tape, op.in[0]), dy, nullptr, nullptr, db);
}

template <class F>
void matmul_backward_tangent(const Op& op, const TapeView& tape, const S* dy, const S* ey, F delta) const {
    const S *ta = tangent(op, 0), *tb = tangent(op, 1);
    if (S* ea = delta(0)) matmul_left_deltas(op, tape, ey, value(tape, op.in[1]), tb ? dy : nullptr, tb, ea);
    if (S* eb = delta(1)) matmul_right_deltas(op, tape, value(tape, op.in[0]), ey, ta, ta ? dy : nullptr, eb);
}

// ---- rows -----------------------------------------------------------------------------------------

// f(offset) for every row of an operation that works on rows.
template <class F>
void each_row(const Op& op, const TapeView& tape, F f) const {
    const long rows = B_ * samples(tape) * op.rows;
    for (long r = 0; r < rows; ++r) f(r * op.width);
}
