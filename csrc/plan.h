// A plan as the kernels see it: plain old data, offsets into a workspace, no ownership.
//
// Index legend: t task, b task of a block, n sample, i feature in, o feature out, k inner step.
#pragma once

#include <cstdint>
#include <type_traits>

#include "conv_regions.h"
#include "families.h"
#include "names.h"

namespace maml_fast {

constexpr bool is_piecewise_linear(Act act) { return act == Act::relu || act == Act::leaky_relu || act == Act::clamp; }

// A parameter's learning rate.
struct RateOf {
    int index;  // -1 where it does not adapt
    bool elementwise;
    long packed;  // of a rate for every weight of a convolution, offset in the weights' order; or -1
};

struct Param {
    long size;
    long offset;          // in a slot; -1 where the parameter has no gradient or its layer is low-rank
    long sum;             // in the sum over tasks; -1 where the parameter has no gradient
    const RateOf* rates;  // per set of rates
    bool adapts;
    // A convolution's weights: (o, c, taps) in the caller's memory, (taps, c, o) everywhere else; 0 for other
    // parameters.
    long o, c, taps;
    long packed;  // offset of θ_0 in that order, or -1
};

// One layer. Which fields mean something depends on the kind.
struct Op {
    OpKind kind;
    Act act;
    const int* in;  // buffer indices; of a linear layer the second is its weight, where that is no parameter
    int n_in;
    int out;
    int w, b;    // parameters, or -1
    int c0, c1;  // constants, or -1
    long rows;   // independent rows a sample has (linear, layer_norm, transpose); outer size (cat)
    long width;  // features in (linear), normalised size (layer_norm), channels (norms, pools), columns (transpose)
    long out_width;
    long groups;              // of a group norm
    double f0, f1;            // attributes; a channel norm's f1 is its activation's slope below zero
    Window window;            // pools, pad, upsample; the pool behind a channel norm
    const Convolution* conv;  // convolutions
    const Pointwise* pointwise;
    const LinearMap* map;
    bool once;                // neither its inputs nor its output have a sample axis: it works once for each task
    bool packs;               // first to use its weight: the one that packs it
    bool behind_conv;         // a channel norm right behind a convolution that nothing else reads
    bool bias_cancels;        // a bias that the batch norm behind it takes out again: its gradient is zero
    bool w_first, b_first;    // first to write the parameter's gradient in a reverse sweep
    const bool* delta_first;  // per input: first to write that input's delta
    const bool* needs_grad;   // per input
    const bool* has_tangent;  // per input
    bool out_has_tangent;
    bool out_needs_grad;
    bool low_rank;      // the adapted weight is never formed: W_k = W_0 + Σ_r c_r P_rᵀ Q_r
    long pack_forward;  // offset of the shared weight's panels, or -1
    long pack_backward;
    long own_panels;  // for a task's own weights in panels, which all sample tiles read; or -1
};

// A linear layer whose weight is a single row or column, whose transpose looks the same in memory.
inline bool is_thin(const Op& op) { return op.width == 1 || op.out_width == 1; }

// A term c Pᵀ Q of a low-rank weight. P holds a layer's output deltas and Q its inputs, of `tape`;
// or one of them is replaced by its tangent of Hessian-vector product `hvp`.
enum class Origin : int { gradient, tangent_delta, tangent_input };

struct LowRankTerm {
    Origin origin;
    int tape, hvp;
    int sign;
    int rates;  // times the learning rate of this set; -1 for none
};

struct LowRankTerms {
    const LowRankTerm* p;
    int n;
};

constexpr int kSums = -2;      // in place of a slot: the sum over tasks
constexpr int kPanelSets = 4;  // of an operation: the transposes and the weights of two products

// One instruction of a program (see maml_fast/algorithms/program.py). Operands that it does not have are -1: slots, and
// a tape.
struct Instr {
    Code code{};
    int slot = -1, theta = -1, out = -1, gradient = -1, vector = -1, adjoint = -1;
    int tape = -1;          // in the end also says of which inner step's samples
    int rates = 0;          // which set of learning rates
    int place = 0;          // of what is loaded or stored: which of the caller's vectors, parameters first
    int function = -1;      // what a pointwise instruction does
    int draws = -1;         // a forward pass: the inner step whose random numbers it draws, or -1 for the query's
    bool seed = false;      // a query loss: also its slope
    double weight = 1;      // of a query loss
    bool add = false;       // a query loss: to what earlier ones left
    bool weighted = false;  // what is accumulated: times the task's weight
    bool inputs = false;    // also the gradient w.r.t. the batch's inputs
    bool repeats = false;   // a forward pass on the support set that is not the first
    int batch = 0;
    int hvp = -1;           // which tangents a Hessian-vector product writes
    int step = -1;          // a backward pass: the slot for θ − α ∘ gradient, which takes the gradient's place; or -1
    bool in_place = false;  // a Hessian-vector product: it is subtracted from what its slot holds
    bool scaled = false;    // and α times it is
    int group_size = 1;     // this many instructions from this one on run for one sample tile after the other
    int sample_tiles = 1;
    LowRankTerms theta_terms{nullptr, 0};   // low-rank part of θ (of a sum's vector)
    LowRankTerms vector_terms{nullptr, 0};  // of the direction
};

// Offsets of one tape's buffers for a tile of its samples; -1 where absent (or, for the input, the caller's memory).
struct TapeView {
    const long* value;  // per buffer: activations
    const long* delta;  // per buffer
    const long* aux1;   // per op: f' (activation), normalised input (layer norm), maxima (pools, pooled norms)
    const long* aux2;   // per op: f'' where it is kept, after a backward pass f'' δy (activation), 1/σ (layer norm),
                        // means and 1/σ (other norms)
    long loss;          // probabilities, or -1
    int batch;
    long first, samples;
    long before;  // samples of all tasks in the caller's tensors before those of this inner step
};

// Offsets of one Hessian-vector product's buffers.
struct TangentView {
    const long* value;  // per buffer: ẋ
    const long* delta;  // per buffer: δ̇
    const long* aux1;   // per op: tangent of the normalised input (layer norm; at the maxima of pooled norms)
    const long* aux2;   // per op: tangent of σ, of means and σ
};

struct PlanView {
    long tasks;
    const Op* ops;
    int n_ops;
    int steady;  // so many operations, the first, give the same in every inner step
    int buffers;
    const long* features;  // per buffer: elements per sample
    const bool* once;      // per buffer: it has no sample axis
    int out;
    int outputs;  // what the network returns, where the output is a loss of a person's own
    const Param* params;
    int n_params;
    int rate_sets;
    const Instr* code;
    int n_code;
    const SlotFunction* functions;  // of pointwise instructions
    const TapeView* const* tapes;   // per tape and inner step whose samples it takes: a view of each sample tile
    const TangentView* tangents;
    int n_hvps;
    const long* gathered;     // per buffer: where its deltas add up over the Hessian-vector products, or -1
    const long* slots;        // offset of each slot
    const long* rate_offset;  // per rate: offset in the rate gradient
    long samples[2];          // support, query
    long parameters;          // elements of a slot
    long sums;                // elements of the sum over tasks of parameter gradients
    long rates;               // elements of the rate gradient, which follows them
    long scratch;             // offset of the scratch for packed weights
    long norm_scratch;        // and for channel norms and sums over rows
    long gemm_scratch;
    long blocks_scratch;  // for blocks of pointwise expressions
    long scalars;         // numbers of each task: of one the tasks of the block, then the next
    long workspace;       // elements per thread
    long packed;          // elements of the shared panels
    long lockstep;        // tasks a thread works on at once
    long blocks;          // of tasks, whose gradients are summed before the ordered reduction
    LossKind loss;
    double loss_parameter;
    double loss_factor[2];  // per batch
    bool has_tangent;       // the output depends on a parameter that adapts
};

constexpr long kUnset = -1;  // in place of a table's rows: a mask that should be set is not

// The caller's memory for one call; element type is the plan's scalar unless said otherwise.
struct Call {
    long tasks;
    const void* const* params;
    const void* const* constants;
    const void* const* rates;
    const void* x[2];
    const void* const* inputs[2];   // the inputs beside x, of S or int64
    const void* y[2];               // int64 labels or values
    const void* const* targets[2];  // those beside y, where a person's own loss takes several
    const void* weights;
    const void* cotangent;
    const void* const* adapted;
    void* losses;     // (T,), or null
    void* objective;  // Σ_t w_t L_t, or null
    void* outputs;
    void* const* gradients;  // per parameter, or null
    void* rate_gradient;
    void* dx[2];
    void* const* dinputs[2];  // of `inputs`, or null
    void* const* adapted_out;
    std::uint64_t seed;     // of the random numbers
    std::int64_t* outside;  // what a lookup reads beside its table: (row, rows), or (0, 0) for nothing
    bool add;               // add to `gradients` rather than overwrite
    int threads;
    int team;  // threads that share one task: more than 1 where there are fewer tasks than threads
    void (*parallel)(int threads, void (*fn)(void* context, int worker), void* context);
    std::int64_t (*clock)();  // nanoseconds; null where instructions are not timed
    std::int64_t* spent;      // per instruction of the plan: this thread's nanoseconds
};

// What a draw's random numbers depend on beside the element.
struct Draw {
    std::uint32_t number, pass, task;
    std::uint64_t seed;
};

// The kernels of one instruction set for one scalar type.
template <class S>
struct KernelsOf {
    long lanes;       // elements of a vector register
    long gemm_depth;  // rows of B that a GEMM packs at once
    // Packs op's shared weight into `arena`, once per call.
    void (*pack)(const PlanView&, const Call&, int op, S* arena);
    // Runs the program for tasks [first, first + count); adds their gradients to `partial`.
    void (*block)(const PlanView&, const Call&, const S* arena, S* workspace, S* partial, long first, long count);
    // Elements [first, first + n) of a draw.
    void (*draw)(const Draw&, long first, long n, S* y);
};

// The argument's type chooses.
const KernelsOf<float>& kernels_baseline(float);
const KernelsOf<double>& kernels_baseline(double);
const KernelsOf<float>& kernels_avx2(float);
const KernelsOf<double>& kernels_avx2(double);
const KernelsOf<float>& kernels_avx512(float);
const KernelsOf<double>& kernels_avx512(double);

// Width of the packed panel that starts at column `j` of `columns`.
inline long panel_width(long columns, long j, long lanes) { return columns - j > lanes ? 2 * lanes : lanes; }

constexpr long kNormChunk = 256;  // rows summed apart before their sums are: small errors, the same for any threads
constexpr int kNormArrays = 12;   // elements per channel that a channel norm's loops read

// Elements of scratch for a channel norm over `rows` rows: its arrays and the chunks' sums.
inline long norm_scratch(long channels, long rows) {
    return channels * (kNormArrays + 4 * ((rows + kNormChunk - 1) / kNormChunk));
}

constexpr long kPointwiseBlock = 256;  // elements that a pointwise expression is computed for at once

constexpr int kProducts = 2;  // products that are added up in one pass
constexpr int kPanels = 2;    // panels that a tile may span

// Elements of a packed matrix: full double-width panels and a last one padded to one or two vectors.
inline long packed_size(long rows, long columns, long lanes) {
    long full = columns / (2 * lanes) * (2 * lanes);
    return rows * (full + (full < columns ? panel_width(columns, full, lanes) : 0));
}

// Elements of a linear layer's weight in panels, transposed or not.
inline long panels_size(const Op& op, long lanes) {
    long transposed = packed_size(op.width, op.out_width, lanes), plain = packed_size(op.out_width, op.width, lanes);
    return transposed > plain ? transposed : plain;
}

// Elements of scratch for a product of activations: the second factor's transpose and its tangent's, and what every
// product needs.
inline long matmul_scratch(const Op& op, long lanes, long depth) {
    return kProducts * packed_size(op.out_width, op.width, lanes) + kProducts * kPanels * depth * 2 * lanes;
}

}  // namespace maml_fast
