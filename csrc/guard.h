// The guard of captured plans.
#pragma once

#include <pybind11/pybind11.h>

namespace maml_fast {

void bind_guard(pybind11::module_& m);

}  // namespace maml_fast
