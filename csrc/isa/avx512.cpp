#include <immintrin.h>

#include "../plan.h"

#define MAML_FAST_BYTES 64
#define MAML_FAST_ROWS 12

namespace maml_fast {
namespace {
#include "../engine.inl"
}  // namespace

const KernelsOf<MAML_FAST_SCALAR>& kernels_avx512(MAML_FAST_SCALAR) {
    static constexpr auto kernels = kernels_of<MAML_FAST_SCALAR>();
    return kernels;
}

}  // namespace maml_fast
