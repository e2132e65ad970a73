// The parts of DLPack 1.x's binary interface (github.com/dmlc/dlpack) that the core uses: how C reads a Python tensor.
#pragma once

#include <cstdint>

namespace maml_fast::dlpack {

constexpr std::uint32_t kMajorVersion = 1;
constexpr const char* kCapsule = "dlpack_exchange_api";

enum class Device : std::int32_t { cpu = 1 };
enum class Kind : std::uint8_t { signed_integer = 0, real = 2 };

struct Type {
    std::uint8_t kind, bits;
    std::uint16_t lanes;
};

struct Tensor {
    void* data;
    std::int32_t device, device_index;
    std::int32_t dimensions;
    Type type;
    std::int64_t *shape, *strides;  // in elements
    std::uint64_t byte_offset;
};

// Functions that the core does not call.
using Unused = void (*)();

struct ExchangeApi {
    struct {
        std::uint32_t major, minor;
        void* older;
    } version;
    Unused allocate, own, wrap;
    // Fills a tensor that `object` goes on owning; returns other than 0 with a Python exception set.
    int (*view)(void* object, Tensor* out);
    Unused stream;
};

}  // namespace maml_fast::dlpack
