// Owns what a Pointwise and a LinearMap point to.
#pragma once

#include <memory>
#include <vector>

#include "spec.h"

namespace maml_fast {

class PointwiseTables {
  public:
    // wanted: the operands whose deltas are; of the others no step is kept.
    PointwiseTables(const OpSpec& op, const std::vector<long>& features, const bool* wanted);
    const Pointwise& view() const { return view_; }

  private:
    Expression expression(const ExpressionSpec& spec, const bool* wanted);

    Pointwise view_{};
    std::vector<std::unique_ptr<ExpressionSpec>> kept_;
};

class LinearMapTables {
  public:
    LinearMapTables(const OpSpec& op, const std::vector<long>& features);
    const LinearMap& view() const { return view_; }

  private:
    LinearMap view_{};
    std::vector<Box> boxes_;
    std::unique_ptr<bool[]> transposed_;
};

}  // namespace maml_fast
