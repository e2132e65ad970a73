// From names to enumerators and back. Not for the kernels, which must not hold functions that all processors share.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "names.h"

namespace maml_fast {

struct Entry {
    std::string_view name;
    std::string_view fields;  // separated by ", "
};

#define MAML_FAST_ENTRY(name, ...) Entry{#name, #__VA_ARGS__},
inline constexpr Entry kOpKinds[] = {MAML_FAST_OP_KINDS(MAML_FAST_ENTRY)};
inline constexpr Entry kActivations[] = {MAML_FAST_ACTIVATIONS(MAML_FAST_ENTRY)};
inline constexpr Entry kPrimitives[] = {MAML_FAST_PRIMITIVES(MAML_FAST_ENTRY)};
inline constexpr Entry kLosses[] = {MAML_FAST_LOSSES(MAML_FAST_ENTRY)};
inline constexpr Entry kInstructions[] = {MAML_FAST_INSTRUCTIONS(MAML_FAST_ENTRY)};
#undef MAML_FAST_ENTRY

// The enumerator of this name. `table` is its enumeration's.
template <class E, std::size_t N>
E enumerator(const Entry (&table)[N], std::string_view name) {
    for (std::size_t i = 0; i < N; ++i)
        if (table[i].name == name) return E(i);
    throw std::invalid_argument("the core knows no '" + std::string(name) + "'");
}

inline OpKind op_kind(std::string_view name) { return enumerator<OpKind>(kOpKinds, name); }
inline Act activation(std::string_view name) { return enumerator<Act>(kActivations, name); }
inline Primitive primitive(std::string_view name) { return enumerator<Primitive>(kPrimitives, name); }
inline LossKind loss_kind(std::string_view name) { return enumerator<LossKind>(kLosses, name); }
inline Code instruction(std::string_view name) { return enumerator<Code>(kInstructions, name); }

inline std::string name_of(OpKind kind) { return std::string(kOpKinds[int(kind)].name); }
inline std::string name_of(Code code) { return std::string(kInstructions[int(code)].name); }

inline std::vector<std::string> fields_of(const Entry& entry) {
    std::vector<std::string> fields;
    for (std::string_view rest = entry.fields; !rest.empty();) {
        std::size_t comma = rest.find(", ");
        fields.emplace_back(rest.substr(0, comma));
        rest = comma == std::string_view::npos ? std::string_view() : rest.substr(comma + 2);
    }
    return fields;
}

}  // namespace maml_fast
