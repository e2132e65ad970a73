// Which instruction set the kernels use: found at run time, or forced by MAML_FAST_ISA.
#pragma once

#include <string>
#include <vector>

namespace maml_fast {

enum class Isa { baseline, avx2, avx512 };

// "baseline", "avx2" or "avx512".
const char* name(Isa isa);

// What this processor (and its operating system) can run, narrowest first; baseline is always there.
std::vector<Isa> available();

// The widest available one, or the one that MAML_FAST_ISA names. Throws std::runtime_error, listing the
// names that would do, where that name is unknown or this processor cannot run it. Reads the environment
// at every call: ask once.
Isa choose();

}  // namespace maml_fast
