// What a plan became: its operations, instructions and memory, for people to read.
#pragma once

#include <pybind11/pybind11.h>

#include "plan.h"

namespace maml_fast {

pybind11::dict describe(const PlanView& plan);

}  // namespace maml_fast
