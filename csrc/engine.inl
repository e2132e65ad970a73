// Runs a plan's program for a few tasks in lockstep: every instruction for all of them, then the next.
// Included once per instruction set, inside that file's own unnamed namespace: nothing here may be a
// symbol that another instruction set could link against.

// clang-format off: in order of dependence
#include "primitives/vector.inl"
#include "primitives/edge.inl"
#include "primitives/gemm.inl"
#include "primitives/indirect.inl"
#include "primitives/math.inl"
#include "primitives/reduce.inl"
#include "layers/activation.inl"
#include "layers/channel_norm.inl"
#include "layers/conv.inl"
#include "layers/layer_norm.inl"
#include "layers/linear.inl"
#include "layers/losses.inl"
#include "layers/pool.inl"
#include "layers/rearrange.inl"
// clang-format on

// A parameter-sized piece of memory for every task of the block; stride 0 where they share it.
template <class S>
struct PerTask {
    S* p;
    long stride;
    explicit operator bool() const { return p != nullptr; }
    S* of(long b) const { return p ? p + b * stride : nullptr; }
};

template <class S>
class Engine {
  public:
    Engine(const PlanView& plan, const Call& call, const S* arena, S* workspace, S* partial)
        : plan_(plan), call_(call), arena_(arena), ws_(workspace), partial_(partial) {}

    void run(long first, long count) {
        for (long done = 0; done < count; done += plan_.lockstep) {
            t0_ = first + done;
            B_ = least(plan_.lockstep, count - done);
            for (int i = 0; i < plan_.n_code; ++i) execute(plan_.code[i]);
        }
    }

  private:
    void execute(const Instr& in) {
        switch (in.code) {
            case Code::load:
                return load_parameters(in.a);
            case Code::forward:
                return forward(in);
            case Code::support_loss:
                return loss(in.a, 0, nullptr, true);
            case Code::query_loss:
                return loss(in.a, 1, static_cast<S*>(call_.losses) + t0_, in.b != 0);
            case Code::cotangent:
                return cotangent(in.a);
            case Code::backward:
                return backward(in);
            case Code::update:
                return update(in.a, in.b, in.c);
            case Code::scale:
                return scale(in.a, in.b);
            case Code::hvp:
                return hvp(in);
            case Code::subtract:
                return subtract(in.a, in.b);
            case Code::rate_gradient:
                return rate_gradient(in.a, in.b);
            case Code::accumulate:
                return accumulate(in);
            case Code::store_parameters:
                return store_parameters(in.a);
            case Code::store_outputs:
                return store_outputs(in.a);
        }
    }

    // ---- where things are --------------------------------------------------------------------

    long samples(const TapeView& tape) const { return plan_.samples[tape.batch]; }
    long per_task(const TapeView& tape, int buffer) const { return samples(tape) * plan_.features[buffer]; }

    const S* value(const TapeView& tape, int buffer) const {
        if (tape.value[buffer] >= 0) return ws_ + tape.value[buffer];
        return static_cast<const S*>(call_.x[tape.batch]) + t0_ * per_task(tape, buffer);
    }
    S* output(const TapeView& tape, int buffer) const { return ws_ + tape.value[buffer]; }

    S* at(long offset) const { return offset < 0 ? nullptr : ws_ + offset; }

    // θ_k of a parameter: the caller's own in slot 0 or where it does not adapt.
    PerTask<const S> weight(int slot, int param) const {
        if (param < 0) return {nullptr, 0};
        const Param& p = plan_.params[param];
        if (slot == 0 || !p.adapts)
            return {p.packed >= 0 ? arena_ + p.packed : static_cast<const S*>(call_.params[param]), 0};
        return {ws_ + plan_.slots[slot] + p.offset, plan_.parameters};
    }

    // Where the inner loop's direction for a parameter stands; absent where it does not adapt.
    PerTask<const S> direction(int slot, int param) const {
        if (param < 0 || !plan_.params[param].adapts) return {nullptr, 0};
        return {ws_ + plan_.slots[slot] + plan_.params[param].offset, plan_.parameters};
    }

    // Where a parameter's gradient goes; absent where none is wanted.
    PerTask<S> gradient(int slot, int param, bool adapted_only) const {
        if (slot < 0 || param < 0) return {nullptr, 0};
        const Param& p = plan_.params[param];
        if (p.offset < 0 || (adapted_only && !p.adapts)) return {nullptr, 0};
        return {ws_ + plan_.slots[slot] + p.offset, plan_.parameters};
    }

    // ---- the network -------------------------------------------------------------------------

    void forward(const Instr& in) {
        int slot = in.a;
        const TapeView& tape = plan_.tapes[in.b];
        long N = samples(tape);
        for (int i = 0; i < plan_.n_ops; ++i) {
            const Op& op = plan_.ops[i];
            const S* x = value(tape, op.in[0]);
            S* y = output(tape, op.out);
            long size = per_task(tape, op.out);
            S *aux1 = at(tape.aux1[i]), *aux2 = at(tape.aux2[i]);
            switch (op.kind) {
                case OpKind::linear:
                    linear_values(op, slot, in.theta, N, x, y);
                    break;
                case OpKind::activation:
                    activation_forward<S>(op, B_ * size, x, y, aux1, aux2);
                    break;
                case OpKind::affine: {
                    S f = S(op.f0), c = S(op.f1);
                    put(true, y, B_ * size, [=](long j) { return f * x[j] + c; });
                    break;
                }
                case OpKind::add: {
                    const S* z = value(tape, op.in[1]);
                    S f = S(op.f0);
                    put(true, y, B_ * size, [=](long j) { return x[j] + f * z[j]; });
                    break;
                }
                case OpKind::cat:
                    join(op, N, y, [&](int b) { return value(tape, b); });
                    break;
                case OpKind::conv:
                    if (pairs_with_norm(i)) {
                        ++i;
                        conv_norm_forward(op, plan_.ops[i], i, slot, tape);
                    } else {
                        conv_values(op, slot, N, x, y);
                    }
                    break;
                case OpKind::max_pool:
                    each_samples(B_ * N, [=, &op](long first, long last) {
                        max_pool_forward(op.window, op.width, first, last, x, y, aux1);
                    });
                    break;
                case OpKind::layer_norm:
                    layer_norm_values(op, slot, N, size, x, y, aux1, aux2);
                    break;
                case OpKind::batch_norm:
                case OpKind::running_norm:
                case OpKind::group_norm:
                    norm_forward(op, i, slot, tape);
                    break;
                default:
                    moved(op, N, x, y);
            }
        }
    }

    // ---- threads that share a task -------------------------------------------------------------

    // f(0) … f(n − 1), each by one thread; which one makes no difference to the result. Fewer than `fewest` are not
    // worth waking anybody.
    template <class F>
    void each(long n, F f, long fewest = 2) const {
        if (call_.team <= 1 || n < fewest) {
            for (long i = 0; i < n; ++i) f(i);
            return;
        }
        struct Job {
            F& f;
            long n, next;
        } job{f, n, 0};
        auto work = [](void* context, int) {
            Job& j = *static_cast<Job*>(context);
            for (long i; (i = __atomic_fetch_add(&j.next, 1, __ATOMIC_RELAXED)) < j.n;) j.f(i);
        };
        call_.parallel(call_.team, work, &job);
    }

    // f(first, last) over n in a few pieces, or in one where nobody shares them.
    template <class F>
    void each_samples(long n, F f) const {
        long pieces = call_.team > 1 ? least(n, 4L * call_.team) : least(n, 1L);
        each(pieces, [=](long i) { f(i * n / pieces, (i + 1) * n / pieces); });
    }

    // A convolution's result in pieces: of samples where they have rows enough for full tiles, and of panels.
    template <class F>
    void each_piece(long N, long positions, long columns, F f) const {
        if (call_.team <= 1) return f(Piece{0, N, 0, columns});
        constexpr long kRows = 512, kColumns = kPanel * lanes<S>;
        long pieces = least(least(N, 4L * call_.team), 1 + N * positions / kRows), panels = ceil_div(columns, kColumns);
        each(pieces * panels, [=](long i) {
            long piece = i / panels, panel = i % panels;
            f(Piece{piece * N / pieces, (piece + 1) * N / pieces, panel * kColumns,
                    least((panel + 1) * kColumns, columns)});
        });
    }

    // ---- layers that move or average numbers: linear, so their tangents are themselves ----------

    void moved(const Op& op, long N, const S* x, S* y) const {
        if (op.kind == OpKind::transpose) return transpose_samples(true, B_ * N, op.rows, op.width, x, y);
        each_samples(B_ * N, [=, &op](long first, long last) {
            if (op.kind == OpKind::pad)
                pad_forward(op.window, op.width, first, last, x, y);
            else if (op.kind == OpKind::upsample)
                upsample_forward(op.window, op.width, first, last, x, y);
            else
                mean_pool_forward(op.window, op.f0 != 0, op.width, first, last, x, y);
        });
    }

    void moved_back(const Op& op, bool first_writer, long N, const S* dy, S* dx) const {
        if (op.kind == OpKind::transpose) return transpose_samples(first_writer, B_ * N, op.width, op.rows, dy, dx);
        long size = plan_.features[op.in[0]];
        each_samples(B_ * N, [=, &op](long first, long last) {
            if (op.kind == OpKind::pad) return pad_backward(op.window, op.width, first_writer, first, last, dy, dx);
            if (first_writer) fill(dx + first * size, (last - first) * size, S(0));
            if (op.kind == OpKind::upsample)
                upsample_backward(op.window, op.width, first, last, dy, dx);
            else
                mean_pool_backward(op.window, op.f0 != 0, op.width, first, last, dy, dx);
        });
    }

    void max_pool_deltas(const Op& op, bool first_writer, long N, const S* where, const S* dy, S* dx) const {
        long size = plan_.features[op.in[0]];
        each_samples(B_ * N, [=, &op](long first, long last) {
            if (first_writer) fill(dx + first * size, (last - first) * size, S(0));
            max_pool_backward(op.window, op.width, first, last, where, dy, dx);
        });
    }

    // ---- convolutions --------------------------------------------------------------------------

    void conv_values(const Op& op, int slot, long N, const S* x, S* y) const {
        PerTask<const S> w = weight(slot, op.w), bias = weight(slot, op.b);
        conv_products(op, N, x, w, nullptr, w, bias, y);
    }

    // y = w * x + v * x' + bias.
    void conv_products(const Op& op, long N, const S* x, PerTask<const S> w, const S* x2, PerTask<const S> v,
                       PerTask<const S> bias, S* y) const {
        const Convolution& c = *op.conv;
        for (long b = 0; b < B_; ++b) {
            auto pair = [&](const S* p, PerTask<const S> weights) {
                return p ? Pair<S>{p + b * N * c.in_size(), weights.of(b)} : Pair<S>{nullptr, nullptr};
            };
            Pair<S> one = pair(x, w), two = pair(x2, v);
            const S* bb = bias.of(b);
            S* yb = y + b * N * c.out_size();
            each_piece(N, c.window.oh * c.window.ow, c.group_outputs(),
                       [=, &c](const Piece& piece) { conv_forward(c, one, two, bb, false, piece, yb); });
        }
    }

    // The turned weights of task b: shared ones are packed already.
    const S* turned(const Op& op, PerTask<const S> w, long b, S* memory) const {
        const Param& p = plan_.params[op.w];
        if (w.stride == 0) return arena_ + op.pack_backward;
        turn_weights(p.o, p.c, p.taps, w.of(b), memory);
        return memory;
    }

    // dx (+)= wᵀ * dy + vᵀ * dy'.
    void conv_deltas(const Op& op, bool first_writer, long N, const S* dy, PerTask<const S> w, const S* dy2,
                     PerTask<const S> v, S* dx) const {
        const Convolution& c = *op.conv;
        long size = N * c.out_size();
        for (long b = 0; b < B_; ++b) {
            Pair<S> one{dy + b * size, turned(op, w, b, scratch())}, two{nullptr, nullptr};
            if (dy2) two = {dy2 + b * size, turned(op, v, b, scratch() + plan_.params[op.w].size)};
            S* to = dx + b * N * c.in_size();
            each_piece(N, c.window.h * c.window.w, c.group_channels(),
                       [=, &c](const Piece& piece) { conv_backward(c, one, two, !first_writer, piece, to); });
        }
    }

    void conv_gradients(const Op& op, bool add, long N, const S* x, const S* dy, PerTask<S> gw, PerTask<S> gb) const {
        const Convolution& c = *op.conv;
        for (long b = 0; b < B_; ++b) {
            const S *xb = x + b * N * c.in_size(), *db = dy + b * N * c.out_size();
            if (gw) conv_weight_gradient(c, add || !op.w_first, 0, N, xb, db, gw.of(b));
            if (gb) conv_bias_gradient(op, N, db, gb.of(b));
        }
    }

    // Of samples [begin, end) of one task.
    void conv_weight_gradient(const Convolution& c, bool add, long begin, long end, const S* x, const S* dy,
                              S* to) const {
        long rows = call_.team > 1 ? 4 * kLatticeRows : kLatticeRows;
        each_stretch(c, begin, end, rows, [&](long first, long last, long top, long bottom) {
            bool sum = add;
            each(gradient_tiles(c),
                 [=, &c](long i) { conv_gradient_tile(c, i, first, last, top, bottom, x, dy, sum, to); });
            add = true;
        });
    }

    void conv_bias_gradient(const Op& op, long N, const S* dy, S* to) const {
        const Convolution& c = *op.conv;
        if (!op.bias_cancels) return sum_rows(op.b_first, N * c.window.oh * c.window.ow, c.outputs, dy, to);
        if (op.b_first) fill(to, c.outputs, S(0));
    }

    // ---- convolutions and the norms behind them, together while the samples are in cache ---------

    bool pairs_with_norm(int conv) const {
        return call_.team <= 1 && conv + 1 < plan_.n_ops && plan_.ops[conv + 1].behind_conv;
    }

    // Calls f(first, last) for runs of samples of `size` numbers that the nearer caches hold.
    template <class F>
    static void each_cached(long N, long size, F f) {
        constexpr long kNumbers = (256 << 10) / sizeof(S);
        long step = size < kNumbers ? kNumbers / size : 1;
        for (long n = 0; n < N; n += step) f(n, least(n + step, N));
    }

    void conv_norm_forward(const Op& conv, const Op& norm, int i, int slot, const TapeView& tape) {
        const Convolution& c = *conv.conv;
        PerTask<const S> w = weight(slot, conv.w), bias = weight(slot, conv.b);
        long N = samples(tape), positions = c.window.oh * c.window.ow;
        Norm<S> n = norm_of(norm, N);
        S* partial = norm_scratch() + kNormArrays * n.C;
        for (long b = 0; b < B_; ++b) {
            Pair<S> one{value(tape, conv.in[0]) + b * N * c.in_size(), w.of(b)}, none{nullptr, nullptr};
            S* z = output(tape, conv.out) + b * N * c.out_size();
            long chunks = 0;
            each_cached(N, c.out_size(), [&](long first, long last) {
                conv_forward(c, one, none, bias.of(b), false, Piece{first, last, 0, c.group_outputs()}, z);
                if (n.constant) return;
                long whole = last == N ? ceil_div(n.rows(), kNormChunk) : last * positions / kNormChunk;
                for (; chunks < whole; ++chunks) chunk_moments(n, z, chunks, partial);
            });
            norm_values_of(norm, i, slot, tape, n, b, [&](S* mean, S* inv) { merge_moments(n, partial, mean, inv); });
        }
    }

    // The reverse sweep through both: deltas of the convolution's output are used while they are warm.
    void conv_norm_backward(const Op& conv, const Op& norm, int i, int slot, const TapeView& tape, int out,
                            bool adapted_only, S* dz, S* dx) {
        const Convolution& c = *conv.conv;
        PerTask<S> gw = gradient(out, conv.w, adapted_only), gb = gradient(out, conv.b, adapted_only);
        long N = samples(tape), positions = c.window.oh * c.window.ow;
        Norm<S> n = norm_of(norm, N);
        for (long b = 0; b < B_; ++b) {
            NormTape<S> t = norm_tape(norm, i, tape, n, b * n.rows(), b * n.out_rows(), b);
            const S *dy = ws_ + tape.delta[norm.out] + b * n.out_rows() * n.C,
                    *x = value(tape, conv.in[0]) + b * N * c.in_size();
            S *d = dz + b * n.rows() * n.C, *to = dx ? dx + b * N * c.in_size() : nullptr;
            norm_sums_of(norm, slot, n, t, b, out, adapted_only, true, dy);
            Pair<S> one{d, dx ? turned(conv, weight(slot, conv.w), b, scratch()) : nullptr}, none{nullptr, nullptr};
            bool add = !conv.w_first;
            each_cached(N, c.out_size(), [&](long first, long last) {
                norm_deltas_of(n, t, true, first * positions, last * positions, dy, d);
                if (dx)
                    conv_backward(c, one, none, !conv.delta_first[0], Piece{first, last, 0, c.group_channels()}, to);
                if (gw) conv_weight_gradient(c, add, first, last, x, d, gw.of(b));
                add = true;
            });
            if (gb) conv_bias_gradient(conv, N, d, gb.of(b));
        }
    }

    // to (+)= Σ_rows.
    void sum_rows(bool first_writer, long rows, long width, const S* m, S* to) const {
        S *sums = norm_scratch(), *partial = sums + width;
        chunked_sums<S>(
            rows, width, partial, sums, [this](long n, auto f) { each(n, f, kFewChunks); },
            [=](long first, long last, S* mine) { column_sums(true, last - first, width, m + first * width, mine); });
        put(first_writer, to, width, [=](long i) { return sums[i]; });
    }

    // ---- norms over channels -------------------------------------------------------------------

    Norm<S> norm_of(const Op& op, long N) const {
        const Window& g = op.window;
        bool grouped = op.kind == OpKind::group_norm;
        return {op.width, grouped ? op.groups : 0,         grouped ? 1 : N, g.h,     g.w, g.oh, g.ow, g.kh,
                g.kw,     op.kind == OpKind::running_norm, S(op.f0),        S(op.f1)};
    }

    // Calls f(b, first row of x, first row of y, statistics so far) for every set of rows that share statistics.
    template <class F>
    void each_set(const Norm<S>& n, long N, F f) const {
        long sets = N / n.samples;
        for (long b = 0; b < B_; ++b)
            for (long s = 0; s < sets; ++s)
                f(b, (b * sets + s) * n.rows(), (b * sets + s) * n.out_rows(), b * sets + s, s == 0);
    }

    static constexpr long kFewChunks = 4;

    // Row chunks [first, last) of n rows.
    template <class F>
    void each_rows(long rows, F f) const {
        if (call_.team <= 1) return f(0, rows);
        long chunks = ceil_div(rows, kNormChunk);
        each(chunks, [=](long i) { f(i * kNormChunk, least((i + 1) * kNormChunk, rows)); }, kFewChunks);
    }

    NormTape<S> norm_tape(const Op& op, int i, const TapeView& tape, const Norm<S>& n, long row, long out_row,
                          long set) const {
        long C = n.C, all = B_ * per_task(tape, op.out);
        const S *stats = ws_ + tape.aux2[i] + set * 2 * C, *maxima = at(tape.aux1[i]);
        return {value(tape, op.in[0]) + row * C, stats, stats + C, maxima ? maxima + out_row * C : nullptr,
                maxima ? maxima + all + out_row * C : nullptr};
    }

    NormTangents<S> norm_tangents(const Op& op, int i, const Norm<S>& n, long row, long out_row, long set) const {
        long C = n.C;
        const S *stats = ws_ + tangents_.aux2[i] + set * 2 * C, *best = at(tangents_.aux1[i]), *tx = tangent(op, 0);
        return {tx ? tx + row * C : nullptr, stats, stats + C, best ? best + out_row * C : nullptr};
    }

    void norm_forward(const Op& op, int i, int slot, const TapeView& tape) {
        long N = samples(tape);
        Norm<S> n = norm_of(op, N);
        S* partial = norm_scratch() + kNormArrays * n.C;
        for (long b = 0; b < B_ * (N / n.samples); ++b) {
            const S* x = norm_tape(op, i, tape, n, b * n.rows(), 0, b).x;
            norm_values_of(op, i, slot, tape, n, b, [&](S* mean, S* inv) {
                each(ceil_div(n.rows(), kNormChunk), [=](long k) { chunk_moments(n, x, k, partial); }, kFewChunks);
                merge_moments(n, partial, mean, inv);
            });
        }
    }

    // Results of one set of rows; moments(mean, inv) finds its statistics.
    template <class F>
    void norm_values_of(const Op& op, int i, int slot, const TapeView& tape, const Norm<S>& n, long set, F moments) {
        long C = n.C, b = set / (samples(tape) / n.samples), out_row = set * n.out_rows();
        NormTape<S> t = norm_tape(op, i, tape, n, set * n.rows(), out_row, set);
        S *arrays = norm_scratch(), *y = output(tape, op.out) + out_row * C, *mean = const_cast<S*>(t.mean),
          *inv = const_cast<S*>(t.inv);
        if (n.constant)
            running_moments(n, constant(op.c0), constant(op.c1), mean, inv);
        else
            moments(mean, inv);
        norm_parameters<S>(C, weight(slot, op.w).of(b), weight(slot, op.b).of(b), nullptr, nullptr, arrays);
        each_rows(n.out_rows(), [=](long first, long last) {
            norm_values(n, arrays, t, first, last, y, const_cast<S*>(t.where), const_cast<S*>(t.best));
        });
    }

    void norm_backward(const Op& op, int i, int slot, const TapeView& tape, int out, bool adapted_only, const S* dy,
                       S* dx) {
        long N = samples(tape), C = op.width;
        Norm<S> n = norm_of(op, N);
        each_set(n, N, [&](long b, long row, long out_row, long set, bool first_set) {
            NormTape<S> t = norm_tape(op, i, tape, n, row, out_row, set);
            const S* d = dy + out_row * C;
            norm_sums_of(op, slot, n, t, b, out, adapted_only, first_set, d);
            if (!dx) return;
            S* to = dx + row * C;
            bool put_first = op.delta_first[0];
            each_rows(n.rows(), [=](long first, long last) { norm_deltas_of(n, t, put_first, first, last, d, to); });
        });
    }

    // What the deltas of one set need of all its rows, and the gradients of weight and bias.
    void norm_sums_of(const Op& op, int slot, const Norm<S>& n, const NormTape<S>& t, long b, int out,
                      bool adapted_only, bool first_set, const S* dy) {
        PerTask<S> gw = gradient(out, op.w, adapted_only), gb = gradient(out, op.b, adapted_only);
        long C = n.C;
        S *arrays = norm_scratch(), *partial = arrays + kNormArrays * C, *sums = arrays + kSumD * C;
        norm_parameters<S>(C, weight(slot, op.w).of(b), weight(slot, op.b).of(b), nullptr, nullptr, arrays);
        chunked_sums<S>(
            n.out_rows(), 2 * C, partial, sums, [this](long count, auto f) { each(count, f, kFewChunks); },
            [=](long first, long last, S* mine) { norm_sums(n, arrays, t, first, last, dy, mine); });
        norm_means(n, arrays);
        if (gw) put(op.w_first && first_set, gw.of(b), C, [=](long c) { return arrays[kSumDx * C + c]; });
        if (gb) put(op.b_first && first_set, gb.of(b), C, [=](long c) { return arrays[kSumD * C + c]; });
    }

    void norm_deltas_of(const Norm<S>& n, const NormTape<S>& t, bool put_first, long first, long last, const S* dy,
                        S* dx) const {
        n.pooled() ? norm_deltas<true>(n, norm_scratch(), t, put_first, first, last, dy, dx)
                   : norm_deltas<false>(n, norm_scratch(), t, put_first, first, last, dy, dx);
    }

    void norm_tangent(const Op& op, int i, int slot, int vector, const TapeView& tape, S* ty) {
        PerTask<const S> w = weight(slot, op.w), bias = weight(slot, op.b), vw = direction(vector, op.w),
                         vb = direction(vector, op.b);
        long N = samples(tape), C = op.width;
        Norm<S> n = norm_of(op, N);
        S *arrays = norm_scratch(), *partial = arrays + kNormArrays * C;
        each_set(n, N, [&](long b, long row, long out_row, long set, bool) {
            NormTape<S> t = norm_tape(op, i, tape, n, row, out_row, set);
            NormTangents<S> v = norm_tangents(op, i, n, row, out_row, set);
            norm_parameters(C, w.of(b), bias.of(b), vw.of(b), vb.of(b), arrays);
            norm_tangent_means_of(n, arrays, t, v, partial);
            each_rows(n.out_rows(), [=](long first, long last) {
                norm_tangent_values(n, arrays, t, v, first, last, ty + out_row * C, const_cast<S*>(v.best));
            });
        });
    }

    // mean(ẋ) and s of a set.
    void norm_tangent_means_of(const Norm<S>& n, const S* arrays, const NormTape<S>& t, const NormTangents<S>& v,
                               S* partial) {
        long C = n.C;
        S *mean = const_cast<S*>(v.mean), *s = const_cast<S*>(v.s);
        if (n.constant || !v.tx) return fill(mean, 2 * C, S(0));
        chunked_sums<S>(
            n.rows(), 2 * C, partial, mean, [this](long count, auto f) { each(count, f, kFewChunks); },
            [=](long first, long last, S* mine) { norm_tangent_moments(n, arrays, t, v.tx, first, last, mine); });
        S m = S(1) / S(n.rows());
        for (long c = 0; c < 2 * C; ++c) mean[c] *= m;
        merge_groups(n, mean);
        merge_groups(n, s);
    }

    void norm_backward_tangent(const Op& op, int i, int slot, int vector, const TapeView& tape, int out, const S* dy,
                               const S* ey, S* ex) {
        PerTask<const S> w = weight(slot, op.w), bias = weight(slot, op.b), vw = direction(vector, op.w),
                         vb = direction(vector, op.b);
        PerTask<S> hw = gradient(out, op.w, false), hb = gradient(out, op.b, false);
        long N = samples(tape), C = op.width;
        Norm<S> n = norm_of(op, N);
        S *arrays = norm_scratch(), *partial = arrays + kNormArrays * C, *sums = arrays + kSumD * C;
        each_set(n, N, [&](long b, long row, long out_row, long set, bool first_set) {
            NormTape<S> t = norm_tape(op, i, tape, n, row, out_row, set);
            NormTangents<S> v = norm_tangents(op, i, n, row, out_row, set);
            const S *d = dy + out_row * C, *e = ey + out_row * C;
            norm_parameters(C, w.of(b), bias.of(b), vw.of(b), vb.of(b), arrays);
            chunked_sums<S>(
                n.out_rows(), 4 * C, partial, sums, [this](long count, auto f) { each(count, f, kFewChunks); },
                [=](long first, long last, S* mine) { norm_tangent_sums(n, arrays, t, v, first, last, d, e, mine); });
            norm_means(n, arrays);
            norm_tangent_means(n, arrays);
            if (hw) put(op.w_first && first_set, hw.of(b), C, [=](long c) { return arrays[kSumTx * C + c]; });
            if (hb) put(op.b_first && first_set, hb.of(b), C, [=](long c) { return arrays[kSumE * C + c]; });
            if (!ex) return;
            S* to = ex + row * C;
            bool put_first = op.delta_first[0];
            each_rows(n.rows(), [=](long first, long last) {
                n.pooled() ? norm_tangent_deltas<true>(n, arrays, t, v, put_first, first, last, d, e, to)
                           : norm_tangent_deltas<false>(n, arrays, t, v, put_first, first, last, d, e, to);
            });
        });
    }

    // ---- dense layers --------------------------------------------------------------------------

    void linear_values(const Op& op, int slot, Factors theta, long N, const S* x, S* y) {
        PerTask<const S> bias = weight(slot, op.b);
        bool spread_bias = op.low_rank && bias.stride != 0;
        if (spread_bias) spread(N * op.rows, op.out_width, bias, y);
        linear_product(op, weight(slot, op.w), N, x, spread_bias ? PerTask<const S>{nullptr, 0} : bias, spread_bias, y);
        if (op.low_rank) add_product(op, theta, N, x, y);
    }

    // ---- low-rank weights: W = W_0 + Σ_r c_r P_rᵀ Q_r -----------------------------------------

    const S* deltas(const Op& op, const Factor& f) const {
        if (f.term == Term::tangent_delta) return ws_ + plan_.tangents[f.hvp].delta[op.out];
        return ws_ + plan_.tapes[f.tape].delta[op.out];
    }
    const S* inputs(const Op& op, const Factor& f) const {
        if (f.term == Term::tangent_input) return ws_ + plan_.tangents[f.hvp].value[op.in[0]];
        return value(plan_.tapes[f.tape], op.in[0]);
    }
    // A layer without a tangent at its input has no such term.
    bool absent(const Op& op, const Factor& f) const { return f.term == Term::tangent_input && !op.has_tangent[0]; }

    S coefficient(const Op& op, const Factor& f) const {
        return S(f.sign) * (f.rate ? *rate(plan_.params[op.w]) : S(1));
    }

    // y += x (Σ_r c_r P_rᵀ Q_r)ᵀ = Σ_r c_r (x Q_rᵀ) P_r.
    void add_product(const Op& op, Factors factors, long N, const S* x, S* y) {
        for (int r = 0; r < factors.n; ++r) {
            const Factor& f = factors.p[r];
            if (absent(op, f)) continue;
            add_term(op, f, N, op.width, op.out_width, x, inputs(op, f), deltas(op, f), true, y);
        }
    }

    // dx += dy (Σ_r c_r P_rᵀ Q_r) = Σ_r c_r (dy P_rᵀ) Q_r.
    void add_transposed_product(const Op& op, Factors factors, long N, const S* dy, S* dx) {
        for (int r = 0; r < factors.n; ++r) {
            const Factor& f = factors.p[r];
            if (absent(op, f)) continue;
            bool owned = plan_.tapes[f.tape].value[op.in[0]] >= 0;
            add_term(op, f, N, op.out_width, op.width, dy, deltas(op, f), inputs(op, f), owned, dx);
        }
    }

    // y += c (x qᵀ) p for every task. `owned`: p lies in the workspace.
    void add_term(const Op& op, const Factor& f, long N, long I, long O, const S* x, const S* q, const S* p, bool owned,
                  S* y) {
        long rows = N * op.rows, rank = samples(plan_.tapes[f.tape]) * op.rows;
        S c = coefficient(op, f);
        for (long b = 0; b < B_; ++b)
            low_rank_product<S>(rows, I, O, rank, c, x + b * rows * I, q + b * rank * I, p + b * rank * O, owned,
                                y + b * rows * O, scratch(), gemm_scratch());
    }

    // Σ_tasks P_rᵀ Q_r into the sum: one product over the rows of all tasks of the block.
    void accumulate_low_rank(const Op& op, Factors factors) {
        S* sum = partial_ + plan_.params[op.w].sum;
        for (int r = 0; r < factors.n; ++r) {
            const Factor& f = factors.p[r];
            if (absent(op, f)) continue;
            long rows = B_ * samples(plan_.tapes[f.tape]) * op.rows;
            const S* p = deltas(op, f);
            if (f.sign < 0) {
                S* negated = scratch();
                put(true, negated, rows * op.out_width, [=](long i) { return -p[i]; });
                p = negated;
            }
            linear_weight_gradient<S>(op, false, rows, p, inputs(op, f), sum, gemm_scratch());
        }
    }

    // y (+)= x Wᵀ + bias, in one product where all tasks share W and bias.
    void linear_product(const Op& op, PerTask<const S> w, long N, const S* x, PerTask<const S> bias, bool add, S* y) {
        long rows = N * op.rows;
        if (w.stride == 0 && bias.stride == 0)
            return linear_forward<S>(op, B_ * rows, x, arena_ + op.pack_forward, bias.p, add, y, gemm_scratch());
        for (long b = 0; b < B_; ++b) {
            const S* panels = arena_ + op.pack_forward;
            if (w.stride != 0) {
                pack_transposed(op.width, op.out_width, w.of(b), scratch());
                panels = scratch();
            }
            linear_forward<S>(op, rows, x + b * rows * op.width, panels, bias.of(b), add, y + b * rows * op.out_width,
                              gemm_scratch());
        }
    }

    // dx (+)= dy W.
    void linear_transposed_product(const Op& op, PerTask<const S> w, bool first, long N, const S* dy, S* dx) {
        long rows = N * op.rows;
        if (w.stride == 0)
            return linear_backward<S>(op, first, B_ * rows, dy, arena_ + op.pack_backward, true, dx, gemm_scratch());
        for (long b = 0; b < B_; ++b)
            linear_backward<S>(op, first, rows, dy + b * rows * op.out_width, w.of(b), false, dx + b * rows * op.width,
                               gemm_scratch());
    }

    void layer_norm_values(const Op& op, int slot, long N, long size, const S* x, S* y, S* xhat, S* inv) {
        PerTask<const S> w = weight(slot, op.w), bias = weight(slot, op.b);
        long rows = N * op.rows;
        for (long b = 0; b < B_; ++b)
            layer_norm_forward<S>(op, rows, x + b * size, w.of(b), bias.of(b), y + b * size, xhat + b * size,
                                  inv + b * rows);
    }

    const S* constant(int c) const { return static_cast<const S*>(call_.constants[c]); }

    // Concatenates the inputs' runs of features, `op.rows` runs a sample.
    template <class F>
    void join(const Op& op, long N, S* y, F input) {
        long runs = B_ * N * op.rows, stride = plan_.features[op.out] / op.rows, offset = 0;
        for (int j = 0; j < op.n_in; ++j) {
            long run = plan_.features[op.in[j]] / op.rows;
            const S* x = input(op.in[j]);
            for (long r = 0; r < runs; ++r) {
                if (x)
                    copy(x + r * run, y + r * stride + offset, run);
                else
                    fill(y + r * stride + offset, run, S(0));
            }
            offset += run;
        }
    }

    // The transpose of `join` for input j.
    void split(const Op& op, int j, bool first, long N, const S* dy, S* dx) {
        long runs = B_ * N * op.rows, stride = plan_.features[op.out] / op.rows, offset = 0;
        for (int i = 0; i < j; ++i) offset += plan_.features[op.in[i]] / op.rows;
        long run = plan_.features[op.in[j]] / op.rows;
        for (long r = 0; r < runs; ++r) {
            const S* from = dy + r * stride + offset;
            put(first, dx + r * run, run, [=](long i) { return from[i]; });
        }
    }

    // ---- losses ------------------------------------------------------------------------------

    void loss(int tape_index, int batch, S* losses, bool slope) {
        const TapeView& tape = plan_.tapes[tape_index];
        long N = samples(tape), F = plan_.features[plan_.out], size = N * F;
        S d = S(plan_.loss_parameter);
        for (long b = 0; b < B_; ++b) {
            const S* z = value(tape, plan_.out) + b * size;
            S* dz = slope ? ws_ + tape.delta[plan_.out] + b * size : nullptr;
            S weight = batch == 1 && slope ? static_cast<const S*>(call_.weights)[t0_ + b] : S(1);
            S value;
            if (plan_.loss == LossKind::cross_entropy) {
                const std::int64_t* y = static_cast<const std::int64_t*>(call_.y[batch]) + (t0_ + b) * N;
                S* p = ws_ + tape.loss + b * size;
                value = cross_entropy_value(N, F, d, z, y, p) / S(N);
                if (dz) cross_entropy_slope(N, F, d, weight / S(N), y, p, dz);
            } else {
                const S* y = static_cast<const S*>(call_.y[batch]) + (t0_ + b) * size;
                LossKind kind = plan_.loss;
                value = losses ? sum_of<S>(size, [=](long i) { return pointwise_value(kind, z[i], y[i], d); }) / S(size)
                               : S(0);
                S scale = weight / S(size);
                if (dz) put(true, dz, size, [=](long i) { return scale * pointwise_slope(kind, z[i], y[i], d); });
            }
            if (losses) losses[b] = value;
        }
    }

    void loss_tangent(const TapeView& tape) {
        long N = samples(tape), F = plan_.features[plan_.out], size = N * F;
        S d = S(plan_.loss_parameter);
        for (long b = 0; b < B_; ++b) {
            const S* tz = ws_ + tangents_.value[plan_.out] + b * size;
            S* ez = ws_ + tangents_.delta[plan_.out] + b * size;
            if (plan_.loss == LossKind::cross_entropy) {
                cross_entropy_tangent(N, F, S(1) / S(N), ws_ + tape.loss + b * size, tz, ez);
            } else {
                const S* z = value(tape, plan_.out) + b * size;
                const S* y = static_cast<const S*>(call_.y[0]) + (t0_ + b) * size;
                LossKind kind = plan_.loss;
                S scale = S(1) / S(size);
                put(true, ez, size, [=](long i) { return scale * pointwise_curvature(kind, z[i], y[i], d) * tz[i]; });
            }
        }
    }

    void cotangent(int tape_index) {
        const TapeView& tape = plan_.tapes[tape_index];
        long size = per_task(tape, plan_.out);
        copy(static_cast<const S*>(call_.cotangent) + t0_ * size, ws_ + tape.delta[plan_.out], B_ * size);
    }

    // ---- reverse -----------------------------------------------------------------------------

    // The delta of an input; null where it is not wanted.
    S* input_delta(const TapeView& tape, const Op& op, int j, bool inputs) const {
        int buffer = op.in[j];
        if (!op.wants_delta[j]) return nullptr;
        if (tape.value[buffer] >= 0) return ws_ + tape.delta[buffer];
        return inputs ? static_cast<S*>(call_.dx[tape.batch]) + t0_ * per_task(tape, buffer) : nullptr;
    }

    void backward(const Instr& in) {
        int slot = in.a, out = in.c;
        bool inputs = in.inputs;
        const TapeView& tape = plan_.tapes[in.b];
        long N = samples(tape);
        bool adapted_only = tape.batch == 0;
        for (int i = plan_.n_ops - 1; i >= 0; --i) {
            const Op& op = plan_.ops[i];
            if (!op.out_wants_delta) continue;
            const S* dy = ws_ + tape.delta[op.out];
            long size = B_ * per_task(tape, op.out);
            S* dx = input_delta(tape, op, 0, inputs);
            bool first = op.delta_first[0];
            switch (op.kind) {
                case OpKind::linear: {
                    PerTask<S> gw = gradient(out, op.w, adapted_only), gb = gradient(out, op.b, adapted_only);
                    if (dx) linear_transposed_product(op, weight(slot, op.w), first, N, dy, dx);
                    if (dx && op.low_rank) add_transposed_product(op, in.theta, N, dy, dx);
                    linear_gradients(op, N, value(tape, op.in[0]), dy, gw, gb);
                    break;
                }
                case OpKind::activation:
                    if (dx) activation_backward<S>(first, size, ws_ + tape.aux1[i], dy, dx);
                    break;
                case OpKind::affine: {
                    S f = S(op.f0);
                    if (dx) put(first, dx, size, [=](long j) { return f * dy[j]; });
                    break;
                }
                case OpKind::add:
                    for (int j = 0; j < 2; ++j) {
                        S f = j ? S(op.f0) : S(1);
                        if (S* dj = input_delta(tape, op, j, inputs))
                            put(op.delta_first[j], dj, size, [=](long k) { return f * dy[k]; });
                    }
                    break;
                case OpKind::cat:
                    for (int j = 0; j < op.n_in; ++j)
                        if (S* dj = input_delta(tape, op, j, inputs)) split(op, j, op.delta_first[j], N, dy, dj);
                    break;
                case OpKind::conv: {
                    PerTask<S> gw = gradient(out, op.w, adapted_only), gb = gradient(out, op.b, adapted_only);
                    PerTask<const S> w = weight(slot, op.w);
                    if (dx) conv_deltas(op, first, N, dy, w, nullptr, w, dx);
                    conv_gradients(op, false, N, value(tape, op.in[0]), dy, gw, gb);
                    break;
                }
                case OpKind::max_pool:
                    if (dx) max_pool_deltas(op, first, N, ws_ + tape.aux1[i], dy, dx);
                    break;
                case OpKind::layer_norm:
                    layer_norm_deltas(op, i, slot, tape, out, adapted_only, dy, dx);
                    break;
                case OpKind::batch_norm:
                case OpKind::running_norm:
                case OpKind::group_norm:
                    if (dx && i > 0 && pairs_with_norm(i - 1)) {
                        const Op& conv = plan_.ops[i - 1];
                        conv_norm_backward(conv, op, i, slot, tape, out, adapted_only, dx,
                                           input_delta(tape, conv, 0, inputs));
                        --i;
                    } else {
                        norm_backward(op, i, slot, tape, out, adapted_only, dy, dx);
                    }
                    break;
                default:
                    if (dx) moved_back(op, first, N, dy, dx);
            }
        }
    }

    void linear_gradients(const Op& op, long N, const S* x, const S* dy, PerTask<S> gw, PerTask<S> gb) {
        long rows = N * op.rows;
        for (long b = 0; b < B_; ++b) {
            const S* db = dy + b * rows * op.out_width;
            if (gw)
                linear_weight_gradient<S>(op, op.w_first, rows, db, x + b * rows * op.width, gw.of(b), gemm_scratch());
            if (gb) column_sums(op.b_first, rows, op.out_width, db, gb.of(b));
        }
    }

    void layer_norm_deltas(const Op& op, int i, int slot, const TapeView& tape, int out, bool adapted_only, const S* dy,
                           S* dx) {
        PerTask<S> gw = gradient(out, op.w, adapted_only), gb = gradient(out, op.b, adapted_only);
        PerTask<const S> w = weight(slot, op.w);
        long size = per_task(tape, op.out), rows = samples(tape) * op.rows, C = op.width;
        S* sums = scratch();
        for (long b = 0; b < B_; ++b) {
            const S *hb = ws_ + tape.aux1[i] + b * size, *ib = ws_ + tape.aux2[i] + b * rows, *db = dy + b * size;
            if (dx) layer_norm_backward<S>(op, op.delta_first[0], rows, hb, ib, w.of(b), db, dx + b * size);
            if (gw || gb) row_norm_sums(C, rows, hb, db, sums);
            if (gw) put(op.w_first, gw.of(b), C, [=](long c) { return sums[c]; });
            if (gb) put(op.b_first, gb.of(b), C, [=](long c) { return sums[C + c]; });
        }
    }

    // Σ_rows δy x̂ and Σ_rows δy, for norms whose weights run along the row.
    static void row_norm_sums(long C, long rows, const S* xhat, const S* dy, S* sums) {
        fill(sums, 2 * C, S(0));
        for (long r = 0; r < rows; ++r)
            for (long c = 0; c < C; ++c) {
                sums[c] += dy[r * C + c] * xhat[r * C + c];
                sums[C + c] += dy[r * C + c];
            }
    }

    // ---- Hessian-vector product: the tangent of forward and backward ---------------------------

    void hvp(const Instr& in) {
        const TapeView& tape = plan_.tapes[in.b];
        if (!plan_.moves) return fill(ws_ + plan_.slots[in.d], B_ * plan_.parameters, S(0));
        tangents_ = plan_.tangents[in.hvp];
        forward_tangent(in, tape);
        loss_tangent(tape);
        backward_tangent(in, tape);
        if (!in.inputs) return;
        long size = per_task(tape, 0);
        const S* ex = ws_ + tangents_.delta[0];
        S* dx = static_cast<S*>(call_.dx[0]) + t0_ * size;
        for (long i = 0; i < B_ * size; ++i) dx[i] -= ex[i];
    }

    S* tangent(const Op& op, int j) const { return op.has_tangent[j] ? ws_ + tangents_.value[op.in[j]] : nullptr; }

    void forward_tangent(const Instr& in, const TapeView& tape) {
        int slot = in.a, vector = in.c;
        long N = samples(tape);
        for (int i = 0; i < plan_.n_ops; ++i) {
            const Op& op = plan_.ops[i];
            if (!op.out_has_tangent) {
                clear_tangent_aux(op, i, tape);
                continue;
            }
            S* ty = ws_ + tangents_.value[op.out];
            const S* tx = tangent(op, 0);
            long size = B_ * per_task(tape, op.out);
            switch (op.kind) {
                case OpKind::linear:
                    linear_tangent(op, in, tape, tx, ty);
                    break;
                case OpKind::activation:
                    activation_tangent<S>(size, ws_ + tape.aux1[i], tx, ty);
                    break;
                case OpKind::affine: {
                    S f = S(op.f0);
                    put(true, ty, size, [=](long j) { return f * tx[j]; });
                    break;
                }
                case OpKind::add: {
                    const S* tz = tangent(op, 1);
                    S f = S(op.f0);
                    if (tx && tz)
                        put(true, ty, size, [=](long j) { return tx[j] + f * tz[j]; });
                    else if (tx)
                        copy(tx, ty, size);
                    else
                        put(true, ty, size, [=](long j) { return f * tz[j]; });
                    break;
                }
                case OpKind::cat: {
                    int j = 0;
                    join(op, N, ty, [&](int) { return tangent(op, j++); });
                    break;
                }
                case OpKind::conv:
                    conv_tangent(op, in, tape, tx, ty);
                    break;
                case OpKind::max_pool: {
                    const S* where = ws_ + tape.aux1[i];
                    each_samples(B_ * N, [=, &op](long first, long last) {
                        max_pool_tangent(op.window, op.width, first, last, where, tx, ty);
                    });
                    break;
                }
                case OpKind::layer_norm:
                    layer_norm_tangents(op, i, slot, vector, tape, tx, ty);
                    break;
                case OpKind::batch_norm:
                case OpKind::running_norm:
                case OpKind::group_norm:
                    norm_tangent(op, i, slot, vector, tape, ty);
                    break;
                default:
                    moved(op, N, tx, ty);
            }
        }
    }

    void conv_tangent(const Op& op, const Instr& in, const TapeView& tape, const S* tx, S* ty) {
        PerTask<const S> w = weight(in.a, op.w), v = direction(in.c, op.w), vb = direction(in.c, op.b);
        const S* x = v ? value(tape, op.in[0]) : nullptr;
        if (tx)
            conv_products(op, samples(tape), tx, w, x, v, vb, ty);
        else
            conv_products(op, samples(tape), x, v, nullptr, v, vb, ty);
    }

    // The backward tangent of a norm reads these even where nothing upstream moves.
    void clear_tangent_aux(const Op& op, int i, const TapeView& tape) {
        if (tangents_.aux1[i] >= 0) fill(ws_ + tangents_.aux1[i], B_ * per_task(tape, op.out), S(0));
        if (tangents_.aux2[i] < 0) return;
        long N = samples(tape);
        long numbers =
            op.kind == OpKind::layer_norm ? N * op.rows : 2 * op.width * (op.kind == OpKind::group_norm ? N : 1);
        fill(ws_ + tangents_.aux2[i], B_ * numbers, S(0));
    }

    void linear_tangent(const Op& op, const Instr& in, const TapeView& tape, const S* tx, S* ty) {
        long N = samples(tape);
        PerTask<const S> w = weight(in.a, op.w), v = direction(in.c, op.w), vb = direction(in.c, op.b),
                         none{nullptr, 0};
        if (op.low_rank || (!tx && !v)) {
            vb ? spread(N * op.rows, op.out_width, vb, ty) : fill(ty, B_ * per_task(tape, op.out), S(0));
            if (tx) linear_product(op, w, N, tx, none, true, ty);
            if (tx && op.low_rank) add_product(op, in.theta, N, tx, ty);
            if (op.low_rank) add_product(op, in.vector, N, value(tape, op.in[0]), ty);
            return;
        }
        if (tx) linear_product(op, w, N, tx, vb, false, ty);
        if (v) linear_product(op, v, N, value(tape, op.in[0]), tx ? none : vb, tx != nullptr, ty);
    }

    // Every row of a task ← its bias direction.
    void spread(long rows, long width, PerTask<const S> v, S* y) {
        for (long b = 0; b < B_; ++b)
            for (long r = 0; r < rows; ++r) copy(v.of(b), y + (b * rows + r) * width, width);
    }

    void layer_norm_tangents(const Op& op, int i, int slot, int vector, const TapeView& tape, const S* tx, S* ty) {
        PerTask<const S> w = weight(slot, op.w), vw = direction(vector, op.w), vb = direction(vector, op.b);
        long size = per_task(tape, op.out), rows = samples(tape) * op.rows;
        for (long b = 0; b < B_; ++b)
            layer_norm_tangent<S>(op, rows, ws_ + tape.aux1[i] + b * size, ws_ + tape.aux2[i] + b * rows, w.of(b),
                                  vw.of(b), vb.of(b), tx ? tx + b * size : nullptr, ty + b * size,
                                  ws_ + tangents_.aux1[i] + b * size, ws_ + tangents_.aux2[i] + b * rows);
    }

    // The tangent of an input's delta; null where it is not wanted.
    S* input_tangent_delta(const TapeView& tape, const Op& op, int j, bool inputs) const {
        if (!op.wants_delta[j] || (tape.value[op.in[j]] < 0 && !inputs)) return nullptr;
        return ws_ + tangents_.delta[op.in[j]];
    }

    void backward_tangent(const Instr& in, const TapeView& tape) {
        int slot = in.a, vector = in.c, out = in.d;
        bool inputs = in.inputs;
        long N = samples(tape);
        for (int i = plan_.n_ops - 1; i >= 0; --i) {
            const Op& op = plan_.ops[i];
            if (!op.out_wants_delta) continue;
            const S *dy = ws_ + tape.delta[op.out], *ey = ws_ + tangents_.delta[op.out];
            long size = B_ * per_task(tape, op.out);
            S* ex = input_tangent_delta(tape, op, 0, inputs);
            const S* tx = tangent(op, 0);
            bool first = op.delta_first[0];
            switch (op.kind) {
                case OpKind::linear:
                    linear_backward_tangent(op, in, tape, tx, dy, ey, ex);
                    break;
                case OpKind::activation:
                    if (ex)
                        activation_backward_tangent<S>(first, size, ws_ + tape.aux1[i], at(tape.aux2[i]), tx, dy, ey,
                                                       ex);
                    break;
                case OpKind::affine: {
                    S f = S(op.f0);
                    if (ex) put(first, ex, size, [=](long j) { return f * ey[j]; });
                    break;
                }
                case OpKind::add:
                    for (int j = 0; j < 2; ++j) {
                        S f = j ? S(op.f0) : S(1);
                        if (S* ej = input_tangent_delta(tape, op, j, inputs))
                            put(op.delta_first[j], ej, size, [=](long k) { return f * ey[k]; });
                    }
                    break;
                case OpKind::cat:
                    for (int j = 0; j < op.n_in; ++j)
                        if (S* ej = input_tangent_delta(tape, op, j, inputs))
                            split(op, j, op.delta_first[j], N, ey, ej);
                    break;
                case OpKind::conv:
                    conv_backward_tangent(op, in, tape, tx, dy, ey, ex);
                    break;
                case OpKind::max_pool:
                    if (ex) max_pool_deltas(op, first, N, ws_ + tape.aux1[i], ey, ex);
                    break;
                case OpKind::layer_norm:
                    layer_norm_tangent_deltas(op, i, slot, vector, tape, out, dy, ey, ex);
                    break;
                case OpKind::batch_norm:
                case OpKind::running_norm:
                case OpKind::group_norm:
                    norm_backward_tangent(op, i, slot, vector, tape, out, dy, ey, ex);
                    break;
                default:
                    if (ex) moved_back(op, first, N, ey, ex);
            }
        }
    }

    void linear_backward_tangent(const Op& op, const Instr& in, const TapeView& tape, const S* tx, const S* dy,
                                 const S* ey, S* ex) {
        long N = samples(tape), rows = N * op.rows;
        int out = in.d;
        PerTask<const S> v = direction(in.c, op.w);
        if (ex) {
            linear_transposed_product(op, weight(in.a, op.w), op.delta_first[0], N, ey, ex);
            if (v) linear_transposed_product(op, v, false, N, dy, ex);
            if (op.low_rank) add_transposed_product(op, in.theta, N, ey, ex);
            if (op.low_rank) add_transposed_product(op, in.vector, N, dy, ex);
        }
        PerTask<S> hw = gradient(out, op.w, false), hb = gradient(out, op.b, false);
        linear_gradients(op, N, value(tape, op.in[0]), ey, hw, hb);
        if (!hw || !tx) return;
        for (long b = 0; b < B_; ++b)
            linear_weight_gradient<S>(op, false, rows, dy + b * rows * op.out_width, tx + b * rows * op.width, hw.of(b),
                                      gemm_scratch());
    }

    void conv_backward_tangent(const Op& op, const Instr& in, const TapeView& tape, const S* tx, const S* dy,
                               const S* ey, S* ex) {
        long N = samples(tape);
        PerTask<const S> v = direction(in.c, op.w);
        if (ex) conv_deltas(op, op.delta_first[0], N, ey, weight(in.a, op.w), v ? dy : nullptr, v, ex);
        PerTask<S> hw = gradient(in.d, op.w, false), hb = gradient(in.d, op.b, false), none{nullptr, 0};
        conv_gradients(op, false, N, value(tape, op.in[0]), ey, hw, hb);
        if (tx) conv_gradients(op, true, N, tx, dy, hw, none);
    }

    void layer_norm_tangent_deltas(const Op& op, int i, int slot, int vector, const TapeView& tape, int out,
                                   const S* dy, const S* ey, S* ex) {
        PerTask<const S> w = weight(slot, op.w), vw = direction(vector, op.w);
        PerTask<S> hw = gradient(out, op.w, false), hb = gradient(out, op.b, false);
        long size = per_task(tape, op.out), rows = samples(tape) * op.rows, C = op.width;
        S* sums = scratch();
        for (long b = 0; b < B_; ++b) {
            const S *xh = ws_ + tape.aux1[i] + b * size, *ib = ws_ + tape.aux2[i] + b * rows;
            const S *th = ws_ + tangents_.aux1[i] + b * size, *sb = ws_ + tangents_.aux2[i] + b * rows;
            const S *db = dy + b * size, *eb = ey + b * size;
            row_norm_tangent_sums(C, rows, xh, th, db, eb, sums);
            if (ex)
                layer_norm_backward_tangent<S>(op, op.delta_first[0], rows, xh, ib, th, sb, w.of(b), vw.of(b), db, eb,
                                               ex + b * size);
            if (hw) put(op.w_first, hw.of(b), C, [=](long c) { return sums[2 * C + c]; });
            if (hb) put(op.b_first, hb.of(b), C, [=](long c) { return sums[3 * C + c]; });
        }
    }

    static void row_norm_tangent_sums(long C, long rows, const S* xhat, const S* txhat, const S* dy, const S* ey,
                                      S* sums) {
        fill(sums + 2 * C, 2 * C, S(0));
        for (long r = 0; r < rows; ++r)
            for (long c = 0; c < C; ++c) {
                long i = r * C + c;
                sums[2 * C + c] += ey[i] * xhat[i] + dy[i] * txhat[i];
                sums[3 * C + c] += ey[i];
            }
    }

    // ---- parameter-sized vectors -------------------------------------------------------------

    template <class F>
    void each_adapted(F f) {
        for (int p = 0; p < plan_.n_params; ++p)
            if (plan_.params[p].adapts)
                for (long b = 0; b < B_; ++b) f(p, plan_.params[p], b);
    }

    S* slot(int index, const Param& p, long b) const {
        return ws_ + plan_.slots[index] + b * plan_.parameters + p.offset;
    }

    const S* rate(const Param& p) const {
        return p.rate_packed >= 0 ? arena_ + p.rate_packed : static_cast<const S*>(call_.rates[p.rate]);
    }

    void update(int out, int theta, int grad) {
        each_adapted([&](int index, const Param& p, long b) {
            const S *from = weight(theta, index).of(b), *g = slot(grad, p, b), *a = rate(p);
            S *to = slot(out, p, b), alpha = *a;
            if (p.elementwise)
                for (long i = 0; i < p.size; ++i) to[i] = from[i] - a[i] * g[i];
            else
                for (long i = 0; i < p.size; ++i) to[i] = from[i] - alpha * g[i];
        });
    }

    void scale(int out, int vector) {
        each_adapted([&](int, const Param& p, long b) {
            const S *from = slot(vector, p, b), *a = rate(p);
            S *to = slot(out, p, b), alpha = *a;
            if (p.elementwise)
                for (long i = 0; i < p.size; ++i) to[i] = a[i] * from[i];
            else
                for (long i = 0; i < p.size; ++i) to[i] = alpha * from[i];
        });
    }

    void subtract(int out, int vector) {
        S *to = ws_ + plan_.slots[out], *from = ws_ + plan_.slots[vector];
        for (long i = 0; i < B_ * plan_.parameters; ++i) to[i] -= from[i];
    }

    void accumulate(const Instr& in) {
        for (int p = 0; p < plan_.n_params; ++p) {
            const Param& param = plan_.params[p];
            if (param.offset < 0) continue;
            for (long b = 0; b < B_; ++b) {
                const S* from = slot(in.a, param, b);
                put(false, partial_ + param.sum, param.size, [=](long i) { return from[i]; });
            }
        }
        for (int i = 0; i < plan_.n_ops; ++i)
            if (plan_.ops[i].low_rank) accumulate_low_rank(plan_.ops[i], in.theta);
    }

    void rate_gradient(int grad, int adjoint) {
        each_adapted([&](int, const Param& p, long b) {
            const S *g = slot(grad, p, b), *l = slot(adjoint, p, b);
            S* to = partial_ + plan_.sums + plan_.rate_offset[p.rate];
            if (p.elementwise)
                for (long i = 0; i < p.size; ++i) to[i] -= g[i] * l[i];
            else
                *to -= sum_of<S>(p.size, [=](long i) { return g[i] * l[i]; });
        });
    }

    void load_parameters(int index) {
        each_adapted([&](int param, const Param& p, long b) {
            const S* from = static_cast<const S*>(call_.adapted[param]) + (t0_ + b) * p.size;
            p.taps ? conv_weights_inward(p.o, p.c, p.taps, from, slot(index, p, b))
                   : copy(from, slot(index, p, b), p.size);
        });
    }

    void store_parameters(int theta) {
        for (int p = 0; p < plan_.n_params; ++p)
            for (long b = 0; b < B_; ++b) {
                const Param& param = plan_.params[p];
                S* to = static_cast<S*>(call_.adapted_out[p]) + (t0_ + b) * param.size;
                const S* from = weight(theta, p).of(b);
                param.taps ? conv_weights_outward(param.o, param.c, param.taps, from, to) : copy(from, to, param.size);
            }
    }

    void store_outputs(int tape_index) {
        const TapeView& tape = plan_.tapes[tape_index];
        long size = per_task(tape, plan_.out);
        copy(value(tape, plan_.out), static_cast<S*>(call_.outputs) + t0_ * size, B_ * size);
    }

    S* scratch() const { return ws_ + plan_.scratch; }
    S* norm_scratch() const { return ws_ + plan_.norm_scratch; }
    S* gemm_scratch() const { return ws_ + plan_.gemm_scratch; }

    const PlanView& plan_;
    const Call& call_;
    const S* arena_;
    S* ws_;
    S* partial_;
    long t0_ = 0, B_ = 0;
    TangentView tangents_{};  // of the Hessian-vector product under way
};

template <class S>
void pack_op(const PlanView& plan, const Call& call, int index, S* arena) {
    const Op& op = plan.ops[index];
    if (op.kind != OpKind::linear && op.kind != OpKind::conv) return;
    const S* w = static_cast<const S*>(call.params[op.w]);
    if (op.kind == OpKind::linear) {
        if (op.pack_forward >= 0) pack_transposed(op.width, op.out_width, w, arena + op.pack_forward);
        if (op.pack_backward >= 0) pack(op.out_width, op.width, w, op.width, arena + op.pack_backward);
        return;
    }
    const Param& p = plan.params[op.w];
    if (op.pack_backward >= 0) conv_weights_turned(p.o, p.c, p.taps, w, arena + op.pack_backward);
    if (!op.packs) return;
    conv_weights_inward(p.o, p.c, p.taps, w, arena + p.packed);
    if (p.rate_packed >= 0)
        conv_weights_inward(p.o, p.c, p.taps, static_cast<const S*>(call.rates[p.rate]), arena + p.rate_packed);
}

template <class S>
void run_block(const PlanView& plan, const Call& call, const S* arena, S* workspace, S* partial, long first,
               long count) {
    Engine<S>(plan, call, arena, workspace, partial).run(first, count);
}

template <class S>
constexpr KernelsOf<S> kernels_of() {
    return {lanes<S>, kBlockDepth, pack_op<S>, run_block<S>};
}
