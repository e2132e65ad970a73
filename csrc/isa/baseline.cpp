#include "../plan.h"

#define MAML_FAST_BYTES 16
#define MAML_FAST_ROWS 4

namespace maml_fast {
namespace {
#include "../engine.inl"
}  // namespace

const Kernels& kernels_baseline() {
    static constexpr Kernels kernels{kernels_of<float>(), kernels_of<double>()};
    return kernels;
}

}  // namespace maml_fast
