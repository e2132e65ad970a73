// From a plan's description to offsets: which buffers exist, where they are, who writes them first.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "family_tables.h"
#include "spec.h"

namespace maml_fast {

// Numbers that depend on the instruction set and scalar type.
struct Machine {
    long lanes, gemm_depth, scalar_bytes;
};

// What is read of a tape by instructions after the group that fills it.
enum class Reread { nothing, curvature, everything };

class Layout {
  public:
    Layout(Spec spec, const Machine& machine);
    const PlanView& view() const { return view_; }

  private:
    using Terms = std::vector<LowRankTerm>;

    // Offsets of one tape's buffers, and which of them a later group of instructions reads.
    struct TapePlaces {
        int batch = 0;
        bool lasts = false;  // any: then auxiliaries and probabilities do
        std::vector<bool> value_lasts, delta_lasts;
        std::vector<long> value, delta, aux1, aux2;
        long loss = -1;
        bool holds(std::size_t buffer) const { return buffer < value.size() && value[buffer] >= 0; }
    };

    void add_op(const OpSpec& spec);
    void add_param(int index);
    const RateOf* add_rates(const ParamSpec& spec);
    bool has_rate_per_element(const ParamSpec& spec) const;
    void fill_view();
    double work() const;
    long blocks() const;
    void find_low_rank();
    void find_low_rank_terms();
    void keep_terms(Instr& in, const std::vector<Terms>& slots);
    static void follow(const Instr& in, std::vector<Terms>& slots);
    void find_sample_tiles();
    void find_groups();
    bool read_by_hvp(int buffer, bool delta) const;
    bool steps_fuse() const;
    std::vector<bool> passed_on() const;
    void fuse_steps();
    bool is(std::size_t i, Code wanted) const;
    bool is_step(std::size_t i, const std::vector<bool>& passed) const;
    bool is_subtracted(std::size_t i, const std::vector<bool>& passed) const;
    bool is_adjoint_step(std::size_t i, const std::vector<bool>& passed) const;
    void find_slots();
    void add_functions();
    const bool* find_direct(const ExpressionSpec& code, int index);
    bool runs_on(const SlotFunctionSpec& f, std::size_t param) const;
    void find_flags();
    void find_dependence(std::vector<bool>& has_tangent, std::vector<bool>& needs_grad) const;
    std::vector<bool> find_reach() const;
    void find_steady();
    void find_sets();
    void find_pairs();
    void add_families();
    bool is_once(const OpSpec& op) const { return spec_.once[std::size_t(op.out)]; }
    // Samples that a buffer holds of n.
    long count(std::size_t buffer, long n) const { return spec_.once[buffer] ? 1 : n; }
    void place_panels();
    void place_buffers(long lockstep);
    void place_tape(int index, long lockstep);
    void place_sets();
    void find_lasting(int index, std::vector<bool>& values, std::vector<bool>& deltas) const;
    TapePlaces places_of_tape(int index, long lockstep);
    void place_auxiliaries(TapePlaces& tape, long lockstep, long n);
    TapeView view_of_tile(const TapePlaces& tape, long tile);
    void place_tangents(long lockstep);
    void place_gathered(long lockstep);
    void place_own_panels();
    long* table(std::size_t n);
    long take(long size);
    bool tiled() const { return sample_tiles_[0] > 1 || sample_tiles_[1] > 1; }
    long tile_begin(int batch, long tile) const { return tile * spec_.samples[batch] / sample_tiles_[batch]; }
    long longest_tile(int batch) const {
        return (spec_.samples[batch] + sample_tiles_[batch] - 1) / sample_tiles_[batch];
    }
    long packed(long size);
    long scratch_size(long lockstep) const;
    long norm_scratch_size() const;
    long gemm_scratch_size() const;
    long blocks_scratch_size() const;

    Spec spec_;
    Machine machine_;
    PlanView view_{};
    long used_ = 0;
    std::vector<Op> ops_;
    std::vector<std::unique_ptr<bool[]>> flags_;
    std::vector<Param> params_;
    std::vector<std::unique_ptr<RateOf[]>> rates_;
    std::vector<std::unique_ptr<ConvolutionTables>> convolutions_;
    std::vector<std::unique_ptr<PointwiseTables>> pointwise_;
    std::vector<std::unique_ptr<LinearMapTables>> maps_;
    std::unique_ptr<bool[]> once_;
    std::vector<Terms> terms_;
    std::vector<TangentView> tangents_;
    int hvps_ = 0;
    long sample_tiles_[2] = {1, 1};                      // per batch
    std::vector<Reread> reread_;                         // per tape
    std::vector<std::pair<int, int>> sets_;              // per view of a tape: the tape, and whose samples it takes
    std::vector<long> passing_values_, passing_deltas_;  // per buffer: where all tapes keep what none rereads, or -1
    std::vector<std::vector<TapeView>> tapes_;
    std::vector<const TapeView*> tape_views_;
    std::vector<SlotCode> codes_;
    std::vector<std::unique_ptr<bool[]>> direct_;
    std::vector<std::vector<SlotFunctionOf>> functions_of_;
    std::vector<SlotFunction> functions_;
    std::vector<std::vector<long>> tables_;
    std::vector<long> slots_, rate_offsets_, gathered_;
    std::vector<bool> has_tangent_;  // per buffer: it depends on a parameter that adapts
    TapePlaces first_support_;       // whose steady values all support tapes have
    std::vector<bool> used_slots_;
};

}  // namespace maml_fast
