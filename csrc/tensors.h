// From Python's tensors to addresses: every one with its type, length and storage, checked before anything runs.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "signature.h"

namespace maml_fast {

// The tensors of one call. Needs the interpreter's lock; the addresses hold as long as this and its arguments do.
class Tensors {
  public:
    // What the call reads; a copy where it is not contiguous. Null where it may be absent and is None.
    void* read(pybind11::handle tensor, const Expected& expected);
    // The same of the user's batch, which PyTorch may have yet to negate.
    void* read_batch(pybind11::handle tensor, const Expected& expected);
    // What the call writes and others own.
    void* written(pybind11::handle tensor, const Expected& expected) const;
    // What the call writes and its caller has just made.
    void* made(pybind11::handle tensor, const Expected& expected) const;

  private:
    pybind11::handle keep(pybind11::object tensor);

    std::vector<pybind11::object> copies_;
};

// Everything about tensors but their elements: type, device, shape, whether autograd follows them and whether PyTorch
// has yet to negate them. Asked at every call, where Python would take ten times as long.
class Kinds {
  public:
    // None stands for a tensor that is absent. Without `negation` PyTorch is not asked for that.
    explicit Kinds(const pybind11::list& tensors, bool negation = true);
    // Whether these are as those were; false also where one cannot be looked at.
    bool same(const pybind11::list& tensors) const;
    bool same(std::initializer_list<pybind11::handle> tensors) const;

  private:
    struct Kind {
        bool absent;
        std::int32_t device, device_index;
        std::uint32_t type;
        bool follows, negated;
        std::vector<std::int64_t> shape;
    };

    bool is_same(const Kind& kind, pybind11::handle tensor) const;

    std::vector<Kind> kinds_;
    bool negation_;
};

// The parameters' gradients if each has one of its own type and shape to which a kernel can add; otherwise nothing.
pybind11::list existing_gradients(const pybind11::list& parameters);

// Finds PyTorch's functions. Throws ImportError where this PyTorch has none.
void find_torch();

// Throws ValueError unless `count` labels from `labels` on lie in [0, classes).
void check_labels(const Expected& expected, const void* labels, long classes);

}  // namespace maml_fast
