#include "../plan.h"

#define MAML_FAST_BYTES 32
#define MAML_FAST_ROWS 6

namespace maml_fast {
namespace {
#include "../engine.inl"
}  // namespace

const KernelsOf<MAML_FAST_SCALAR>& kernels_avx2(MAML_FAST_SCALAR) {
    static constexpr auto kernels = kernels_of<MAML_FAST_SCALAR>();
    return kernels;
}

}  // namespace maml_fast
