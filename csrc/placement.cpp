// Where every buffer of a plan is.
#include <algorithm>
#include <utility>

#include "layout.h"

namespace maml_fast {

namespace {

constexpr long kAlignment = 16;  // numbers: a cache line of floats
constexpr long kSlack = 64;      // a vector read past the last buffer stays inside

bool is_channel_norm(OpKind kind) {
    return kind == OpKind::batch_norm || kind == OpKind::running_norm || kind == OpKind::group_norm;
}

bool is_pooled(const Op& op) { return is_channel_norm(op.kind) && op.window.kh * op.window.kw > 1; }

// Numbers of statistics of n samples: 1/σ of every row, or mean and 1/σ of every channel.
long statistics(const Op& op, long n) {
    if (op.kind == OpKind::layer_norm) return n * op.rows;
    return 2 * op.width * (op.kind == OpKind::group_norm ? n : 1);
}

}  // namespace

// Weights that all tasks share, in the order that products read, packed once per call.
void Layout::place_panels() {
    bool backward = spec_.reverse || spec_.samples[0] > 0;
    for (Op& op : ops_) {
        op.pack_forward = op.pack_backward = op.own_panels = -1;
        if (op.w < 0) continue;
        if (op.kind == OpKind::linear) {
            if (!is_thin(op)) op.pack_forward = packed(packed_size(op.width, op.out_width, machine_.lanes));
            if (backward) op.pack_backward = packed(packed_size(op.out_width, op.width, machine_.lanes));
        }
        if (op.kind == OpKind::conv && backward) op.pack_backward = packed(params_[op.w].size);
    }
    packed(kSlack);
}

long Layout::packed(long size) {
    long offset = view_.packed;
    view_.packed += (size + kAlignment - 1) / kAlignment * kAlignment;
    return offset;
}

long Layout::take(long size) {
    long offset = used_;
    used_ += (size + kAlignment - 1) / kAlignment * kAlignment;
    return offset;
}

long Layout::scratch_size(long lockstep) const {
    long size = 0, samples = std::max(spec_.samples[0], spec_.samples[1]);
    for (const Op& op : ops_) {
        if (op.kind == OpKind::layer_norm) size = std::max(size, 4 * op.width);
        if (op.kind == OpKind::conv) size = std::max(size, 2 * params_[op.w].size + kSlack);
        if (op.kind != OpKind::linear) continue;
        size = std::max(size, kProducts * panels_size(op, machine_.lanes));
        if (!op.low_rank) continue;
        long rows = samples * op.rows, widest = std::max(op.width, op.out_width);
        size = std::max(size, packed_size(widest, rows, machine_.lanes) + rows * rows);
        size = std::max(size, kProducts * lockstep * rows * op.out_width);
    }
    return size;
}

long Layout::norm_scratch_size() const {
    long size = 0, samples = std::max(spec_.samples[0], spec_.samples[1]);
    for (const Op& op : ops_) {
        if (is_channel_norm(op.kind))
            size = std::max(size, norm_scratch(op.width, samples * op.window.h * op.window.w));
        if (op.kind == OpKind::conv)
            size = std::max(size, norm_scratch(op.out_width, samples * op.window.oh * op.window.ow));
    }
    return size;
}

long Layout::gemm_scratch_size() const {
    long size = 0;
    for (const Op& op : ops_) {
        if (op.kind == OpKind::matmul) size = std::max(size, matmul_scratch(op, machine_.lanes, machine_.gemm_depth));
        if (op.kind != OpKind::linear) continue;
        long transposed = 2 * op.width > machine_.lanes ? 0 : op.width * op.out_width;
        long panels = kProducts * kPanels * machine_.gemm_depth * 2 * machine_.lanes;
        size = std::max(size, transposed + panels);
    }
    return size;
}

long Layout::blocks_scratch_size() const {
    long places = 0;
    for (const Op& op : ops_) {
        if (op.kind != OpKind::pointwise) continue;
        for (const Expression* e :
             {&op.pointwise->value, &op.pointwise->backward, &op.pointwise->tangent, &op.pointwise->backward_tangent})
            places = std::max(places, long(e->places));
    }
    for (const SlotCode& code : codes_) places = std::max(places, long(code.expression.places));
    return places * kPointwiseBlock;
}

long* Layout::table(std::size_t n) { return tables_.emplace_back(n, -1).data(); }

// All Hessian-vector products share their buffers, but for those whose tangents are factors of a
// low-rank weight: they live on.
void Layout::place_tangents(long lockstep) {
    std::size_t buffers = spec_.features.size();
    std::vector<bool> lives_on(buffers);
    for (const Op& op : ops_)
        if (op.low_rank) lives_on[op.in[0]] = lives_on[op.out] = true;
    long n = longest_tile(0);
    tangents_.clear();
    for (int h = 0; h < hvps_; ++h) {
        long *value = table(buffers), *delta = table(buffers), *aux1 = table(ops_.size()), *aux2 = table(ops_.size());
        for (std::size_t v = 0; v < buffers; ++v) {
            bool reuse = h > 0 && !lives_on[v];
            long size = lockstep * count(v, n) * spec_.features[v];
            if (has_tangent_[v]) value[v] = reuse ? tangents_[0].value[v] : take(size);
            if (v > 0 || spec_.input_gradients) delta[v] = reuse ? tangents_[0].delta[v] : take(size);
        }
        for (std::size_t i = 0; i < ops_.size(); ++i) {
            const Op& op = ops_[i];
            if (!op.out_has_tangent) continue;
            bool normed = op.kind == OpKind::layer_norm || is_pooled(op);
            const long held = count(std::size_t(op.out), n);
            if (normed) aux1[i] = h > 0 ? tangents_[0].aux1[i] : take(lockstep * held * spec_.features[op.out]);
            if (op.kind == OpKind::layer_norm || is_channel_norm(op.kind))
                aux2[i] = h > 0 ? tangents_[0].aux2[i] : take(lockstep * statistics(op, held));
        }
        tangents_.push_back({value, delta, aux1, aux2});
    }
}

// A buffer that only its own group reads holds one sample tile, and all tapes share it; any other holds all samples,
// and a view of a tile begins at its first.
void Layout::place_tape(int index, long lockstep) {
    const TapePlaces t = places_of_tape(index, lockstep);
    std::vector<TapeView>& views = tapes_.emplace_back();
    for (long tile = 0; tile < sample_tiles_[t.batch]; ++tile) views.push_back(view_of_tile(t, tile));
}

// Which of a tape's values and deltas a later group reads.
void Layout::find_lasting(int index, std::vector<bool>& values, std::vector<bool>& deltas) const {
    const bool everything = reread_[index] == Reread::everything, nothing = reread_[index] == Reread::nothing;
    values.assign(spec_.features.size(), everything);
    deltas.assign(spec_.features.size(), everything);
    for (std::size_t v = 1; !nothing && v < values.size(); ++v) {
        values[v] = values[v] || read_by_hvp(int(v), false);
        deltas[v] = deltas[v] || read_by_hvp(int(v), true);
    }
    for (const Op& op : ops_)
        if (op.low_rank) values[op.in[0]] = deltas[op.out] = true;
    for (int i = 0; spec_.tapes[std::size_t(index)] == 0 && i < view_.steady; ++i) values[ops_[i].out] = true;
}

Layout::TapePlaces Layout::places_of_tape(int index, long lockstep) {
    const std::size_t buffers = spec_.features.size();
    TapePlaces t;
    t.batch = spec_.tapes[index];
    t.lasts = reread_[index] != Reread::nothing;
    find_lasting(index, t.value_lasts, t.delta_lasts);
    auto place = [&](bool lasts, long& passing, std::size_t v) {
        if (lasts) return take(lockstep * count(v, spec_.samples[t.batch]) * spec_.features[v]);
        const long longest = std::max(longest_tile(0), longest_tile(1));
        if (passing < 0) passing = take(lockstep * count(v, longest) * spec_.features[v]);
        return passing;
    };
    t.value.assign(buffers, -1);
    t.delta.assign(buffers, -1);
    if (t.batch == 0)
        for (int i = 0; i < view_.steady; ++i)
            if (const auto v = std::size_t(ops_[i].out); first_support_.holds(v)) t.value[v] = first_support_.value[v];
    for (std::size_t v = 1; v < buffers; ++v) {
        if (t.value[v] < 0) t.value[v] = place(t.value_lasts[v], passing_values_[v], v);
        // inner gradients need those of what adapts alone
        const bool comes_back = t.batch != 0 || has_tangent_[v] || int(v) == spec_.out;
        if (comes_back) t.delta[v] = place(t.delta_lasts[v], passing_deltas_[v], v);
    }
    const long n = t.lasts ? spec_.samples[t.batch] : longest_tile(t.batch);
    place_auxiliaries(t, lockstep, n);
    if (spec_.loss == LossKind::cross_entropy) t.loss = take(lockstep * n * spec_.features[spec_.out]);
    if (t.batch == 0 && first_support_.value.empty()) first_support_ = t;
    return t;
}

// What layers keep beside values and deltas, of n samples.
void Layout::place_auxiliaries(TapePlaces& t, long lockstep, long n) {
    t.aux1.assign(ops_.size(), -1);
    t.aux2.assign(ops_.size(), -1);
    for (std::size_t i = 0; i < ops_.size(); ++i) {
        const Op& op = ops_[i];
        if (t.batch == 0 && int(i) < view_.steady && !first_support_.value.empty()) {
            t.aux1[i] = first_support_.aux1[i];
            t.aux2[i] = first_support_.aux2[i];
            continue;
        }
        const long held = count(std::size_t(op.out), n);
        long size = lockstep * held * spec_.features[op.out];
        bool curved = t.batch == 0 && spec_.second_order && op.out_has_tangent && !is_piecewise_linear(op.act);
        if (op.kind == OpKind::activation && (t.batch == 0 || spec_.reverse)) t.aux1[i] = take(size);
        if (op.kind == OpKind::activation && curved) t.aux2[i] = take(size);
        if (op.kind == OpKind::layer_norm || op.kind == OpKind::max_pool || op.kind == OpKind::max)
            t.aux1[i] = take(size);
        if (is_pooled(op)) t.aux1[i] = take(2 * size);
        if (op.kind == OpKind::layer_norm || is_channel_norm(op.kind))
            t.aux2[i] = take(lockstep * statistics(op, held));
    }
}

TapeView Layout::view_of_tile(const TapePlaces& t, long tile) {
    const long first = tile_begin(t.batch, tile), count = tile_begin(t.batch, tile + 1) - first;
    auto shift = [&](bool lasts, long offset, int buffer) {
        return offset < 0 || !lasts ? offset : offset + first * spec_.features[buffer];
    };
    const std::size_t buffers = spec_.features.size();
    long *value = table(buffers), *delta = table(buffers), *aux1 = table(ops_.size()), *aux2 = table(ops_.size());
    for (std::size_t v = 0; v < buffers; ++v) {
        value[v] = shift(t.value_lasts[v], t.value[v], int(v));
        delta[v] = shift(t.delta_lasts[v], t.delta[v], int(v));
    }
    for (std::size_t i = 0; i < ops_.size(); ++i) {
        aux1[i] = shift(t.lasts, t.aux1[i], ops_[i].out);
        aux2[i] = shift(t.lasts, t.aux2[i], ops_[i].out);
    }
    return {value, delta, aux1, aux2, shift(t.lasts, t.loss, spec_.out), t.batch, first, count, 0};
}

// The views of tapes for inner steps with samples of their own.
void Layout::place_sets() {
    for (std::size_t v = tapes_.size(); v < sets_.size(); ++v) {
        std::vector<TapeView> same = tapes_[std::size_t(sets_[v].first)];
        tapes_.push_back(std::move(same));
    }
    for (std::size_t v = 0; v < sets_.size(); ++v)
        for (TapeView& view : tapes_[v]) view.before = std::max(sets_[v].second, 0) * spec_.tasks * spec_.samples[0];
}

// Deltas of steady values that other operations read: with several Hessian-vector products they add up.
void Layout::place_gathered(long lockstep) {
    gathered_.assign(spec_.features.size(), -1);
    if (view_.steady == 0 || hvps_ < 2) return;
    std::vector<bool> steady(spec_.features.size());
    steady[0] = spec_.input_gradients;
    for (int i = 0; i < view_.steady; ++i) steady[ops_[i].out] = true;
    for (const Op* op = ops_.data() + view_.steady; op < ops_.data() + ops_.size(); ++op)
        for (int j = 0; j < op->n_in; ++j)
            if (const auto v = std::size_t(op->in[j]);
                steady[v] && gathered_[v] < 0 && op->out_needs_grad && op->needs_grad[j])
                gathered_[v] = take(lockstep * count(v, spec_.samples[0]) * spec_.features[v]);
}

// A task's own weights in panels serve all sample tiles.
void Layout::place_own_panels() {
    for (Op& op : ops_)
        op.own_panels = op.kind == OpKind::linear && !is_thin(op) && tiled()
                            ? take(kPanelSets * panels_size(op, machine_.lanes))
                            : -1;
}

void Layout::place_buffers(long lockstep) {
    used_ = 0;
    tables_.clear();
    tapes_.clear();
    slots_.clear();
    tape_views_.clear();
    passing_values_.assign(spec_.features.size(), -1);
    passing_deltas_.assign(spec_.features.size(), -1);
    first_support_ = {};
    for (std::size_t t = 0; t < spec_.tapes.size(); ++t) place_tape(int(t), lockstep);
    place_sets();
    for (const auto& views : tapes_) tape_views_.push_back(views.data());
    place_tangents(lockstep);
    place_gathered(lockstep);
    place_own_panels();
    slots_.assign(spec_.slots, -1);
    for (int s = 1; s < spec_.slots; ++s)
        if (used_slots_[s]) slots_[s] = take(lockstep * view_.parameters);

    view_.scalars = take(lockstep * spec_.scalars);
    view_.lockstep = lockstep;
    view_.tapes = tape_views_.data();
    view_.tangents = tangents_.data();
    view_.gathered = gathered_.data();
    view_.slots = slots_.data();
    view_.scratch = take(scratch_size(lockstep));
    view_.norm_scratch = take(norm_scratch_size());
    view_.gemm_scratch = take(gemm_scratch_size());
    view_.blocks_scratch = take(blocks_scratch_size());
    take(kSlack);
    view_.workspace = used_;
}

}  // namespace maml_fast
