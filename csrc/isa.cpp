// Compiled without any ISA flag: this file runs before anything is known about the processor.
#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace maml_fast {

const char* name(Isa isa) {
    switch (isa) {
        case Isa::avx2:
            return "avx2";
        case Isa::avx512:
            return "avx512";
        case Isa::baseline:
            break;
    }
    return "baseline";
}

// Every flag that CMakeLists.txt compiles isa/avx2.cpp and isa/avx512.cpp with must be asked for here.
std::vector<Isa> available() {
    std::vector<Isa> found{Isa::baseline};
#if defined(__x86_64__) && !defined(MAML_FAST_BASELINE)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2) found.push_back(Isa::avx2);
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
        found.push_back(Isa::avx512);
    }
#endif
    return found;
}

Isa choose() {
    const std::vector<Isa> can = available();
    const char* wanted = std::getenv("MAML_FAST_ISA");
    if (wanted == nullptr || *wanted == '\0') return can.back();
    std::string names;
    for (const Isa isa : can) {
        if (std::string(wanted) == name(isa)) return isa;
        names += std::string(names.empty() ? "" : ", ") + name(isa);
    }
    throw std::runtime_error("MAML_FAST_ISA: expected one of " + names + " on this processor, got '" + wanted + "'");
}

}  // namespace maml_fast
