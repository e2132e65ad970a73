#include "layout.h"

#include <algorithm>

namespace maml_fast {

namespace {

constexpr long kAlignment = 16;       // numbers: a cache line of floats
constexpr long kSlack = 64;           // a vector read past the last buffer stays inside
constexpr long kWorkspaceBytes = 384 << 10;  // what tasks in lockstep may take: most of a private cache
constexpr long kLockstep = 4;
constexpr long kBlocks = 16;          // partial sums a call is cut into, whatever the number of threads

bool is_norm(OpKind kind) {
    return kind == OpKind::batch_norm || kind == OpKind::running_norm || kind == OpKind::layer_norm;
}

bool is_piecewise_linear(Act act) {
    return act == Act::relu || act == Act::leaky_relu;
}

}  // namespace

Layout::Layout(Spec spec, const Machine& machine) : spec_(std::move(spec)), machine_(machine) {
    for (const OpSpec& s : spec_.ops) {
        Op op{};
        op.kind = OpKind(s.kind);
        op.act = Act(s.act);
        op.in = s.inputs.data();
        op.n_in = int(s.inputs.size());
        op.out = s.out;
        op.w = s.w;
        op.b = s.b;
        op.c0 = s.c0;
        op.c1 = s.c1;
        op.rows = s.rows;
        op.width = s.width;
        op.out_width = s.out_width;
        op.length = s.length;
        op.f0 = s.f0;
        op.f1 = s.f1;
        ops_.push_back(op);
    }
    long offset = 0;
    for (const ParamSpec& s : spec_.params) {
        params_.push_back({s.size, s.active ? offset : -1, s.rate, s.elementwise, s.adapts && s.active});
        if (s.active) offset += s.size;
    }
    view_.parameters = offset;
    for (long size : spec_.rate_sizes) {
        rate_offsets_.push_back(view_.rates);
        view_.rates += size;
    }

    find_flags();
    place_panels();
    view_.block = (spec_.tasks + kBlocks - 1) / kBlocks;
    long lockstep = std::min(view_.block, kLockstep);
    do {
        place_buffers(lockstep);
    } while (used_ * machine_.scalar_bytes > kWorkspaceBytes && lockstep-- > 1);

    view_.ops = ops_.data();
    view_.n_ops = int(ops_.size());
    view_.features = spec_.features.data();
    view_.n_buffers = int(spec_.features.size());
    view_.out = spec_.out;
    view_.params = params_.data();
    view_.n_params = int(params_.size());
    view_.code = spec_.code.data();
    view_.n_code = int(spec_.code.size());
    view_.rate_offset = rate_offsets_.data();
    view_.rate_size = spec_.rate_sizes.data();
    view_.n_rates = int(rate_offsets_.size());
    std::copy(spec_.samples, spec_.samples + 2, view_.samples);
    view_.loss = LossKind(spec_.loss);
    view_.loss_parameter = spec_.loss_parameter;
}

// Static facts of the reverse sweep: what depends on parameters, and who is first to write a sum.
void Layout::find_flags() {
    std::size_t buffers = spec_.features.size();
    std::vector<bool> moves(buffers), wanted(buffers, spec_.input_gradients), written(buffers);
    std::vector<bool> parameter_written(params_.size());
    for (Op& op : ops_) {
        for (int p : {op.w, op.b}) {
            if (p < 0) continue;
            moves[op.out] = moves[op.out] || params_[p].adapts;
            wanted[op.out] = wanted[op.out] || params_[p].offset >= 0;
        }
        for (int j = 0; j < op.n_in; ++j) {
            moves[op.out] = moves[op.out] || moves[op.in[j]];
            wanted[op.out] = wanted[op.out] || wanted[op.in[j]];
        }
    }
    auto first_write = [](std::vector<bool>& seen, int index) {
        bool first = index >= 0 && !seen[index];
        if (index >= 0) seen[index] = true;
        return first;
    };
    for (auto op = ops_.rbegin(); op != ops_.rend(); ++op) {
        flags_.push_back(std::make_unique<bool[]>(3 * op->n_in));
        bool* flags = flags_.back().get();
        for (int j = 0; j < op->n_in; ++j) {
            flags[j] = first_write(written, op->in[j]);
            flags[op->n_in + j] = wanted[op->in[j]];
            flags[2 * op->n_in + j] = moves[op->in[j]];
        }
        op->delta_first = flags;
        op->wants_delta = flags + op->n_in;
        op->has_tangent = flags + 2 * op->n_in;
        op->out_has_tangent = moves[op->out];
        op->out_wants_delta = wanted[op->out];
        op->w_first = first_write(parameter_written, op->w);
        op->b_first = first_write(parameter_written, op->b);
    }
    view_.moves = moves[spec_.out];
}

// Panels of the weights that all tasks share, packed once a call.
void Layout::place_panels() {
    for (Op& op : ops_) {
        op.pack_forward = op.pack_backward = -1;
        if (op.kind != OpKind::linear) continue;
        op.pack_forward = view_.packed;
        view_.packed += packed_size(op.width, op.out_width, machine_.lanes);
        if (!spec_.reverse && spec_.samples[0] == 0) continue;
        op.pack_backward = view_.packed;
        view_.packed += packed_size(op.out_width, op.width, machine_.lanes);
    }
}

long Layout::take(long size) {
    long offset = used_;
    used_ += (size + kAlignment - 1) / kAlignment * kAlignment;
    return offset;
}

long Layout::scratch_size() const {
    long size = 0;
    for (const Op& op : ops_) {
        size = std::max(size, 4 * op.width);
        if (op.kind == OpKind::linear) size = std::max(size, packed_size(op.width, op.out_width, machine_.lanes));
    }
    return size;
}

long Layout::gemm_scratch_size() const {
    long size = 0;
    for (const Op& op : ops_) {
        if (op.kind != OpKind::linear) continue;
        long columns = std::max(op.width, op.out_width);
        long transposed = 2 * op.width > machine_.lanes ? 0 : op.width * op.out_width;
        size = std::max(size, transposed + packed_size(machine_.gemm_depth, columns, machine_.lanes));
    }
    return size;
}

void Layout::place_buffers(long lockstep) {
    used_ = 0;
    tables_.clear();
    tapes_.clear();
    slots_.clear();
    tables_.reserve(4 * spec_.tapes.size() + 4);
    std::size_t buffers = spec_.features.size();
    auto table = [&](std::size_t n) { return tables_.emplace_back(n, -1).data(); };
    auto groups = [](const Op& op, long n) { return op.kind == OpKind::layer_norm ? n * op.rows : op.width; };

    for (int batch : spec_.tapes) {
        long n = spec_.samples[batch];
        long *value = table(buffers), *delta = table(buffers), *aux1 = table(ops_.size()), *aux2 = table(ops_.size());
        for (std::size_t v = 1; v < buffers; ++v) {
            value[v] = take(lockstep * n * spec_.features[v]);
            delta[v] = take(lockstep * n * spec_.features[v]);
        }
        for (std::size_t i = 0; i < ops_.size(); ++i) {
            const Op& op = ops_[i];
            long size = lockstep * n * spec_.features[op.out];
            bool curved = batch == 0 && spec_.second_order && !is_piecewise_linear(op.act);
            if (op.kind == OpKind::activation && (batch == 0 || spec_.reverse)) aux1[i] = take(size);
            if (op.kind == OpKind::activation && curved) aux2[i] = take(size);
            if (is_norm(op.kind)) aux1[i] = take(size);
            if (is_norm(op.kind)) aux2[i] = take(lockstep * groups(op, n));
        }
        bool softmax = LossKind(spec_.loss) == LossKind::cross_entropy;
        long loss = softmax ? take(lockstep * n * spec_.features[spec_.out]) : -1;
        tapes_.push_back({value, delta, aux1, aux2, loss, batch});
    }

    long n = spec_.samples[0];
    long *tangent = table(buffers), *tangent_delta = table(buffers);
    long *aux1 = table(ops_.size()), *aux2 = table(ops_.size());
    if (spec_.second_order) {
        for (std::size_t v = 0; v < buffers; ++v) {
            if (v > 0) tangent[v] = take(lockstep * n * spec_.features[v]);
            if (v > 0 || spec_.input_gradients) tangent_delta[v] = take(lockstep * n * spec_.features[v]);
        }
        for (std::size_t i = 0; i < ops_.size(); ++i) {
            if (!is_norm(ops_[i].kind)) continue;
            aux1[i] = take(lockstep * n * spec_.features[ops_[i].out]);
            aux2[i] = take(lockstep * groups(ops_[i], n));
        }
    }
    slots_.assign(spec_.slots, -1);
    for (int s = 1; s < spec_.slots; ++s) slots_[s] = take(lockstep * view_.parameters);

    view_.lockstep = lockstep;
    view_.tapes = tapes_.data();
    view_.tangent = tangent;
    view_.tangent_delta = tangent_delta;
    view_.tangent_aux1 = aux1;
    view_.tangent_aux2 = aux2;
    view_.slots = slots_.data();
    view_.scratch = take(scratch_size());
    view_.gemm_scratch = take(gemm_scratch_size());
    take(kSlack);
    view_.workspace = used_;
}

}  // namespace maml_fast
