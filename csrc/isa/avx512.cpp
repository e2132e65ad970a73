#include <immintrin.h>

#include "../plan.h"

#define MAML_FAST_BYTES 64
#define MAML_FAST_ROWS 12

namespace maml_fast {
namespace {
#include "../engine.inl"
}  // namespace

const Kernels& kernels_avx512() {
    static constexpr Kernels kernels{kernels_of<float>(), kernels_of<double>()};
    return kernels;
}

}  // namespace maml_fast
