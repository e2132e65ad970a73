// Refuses a description that would lead the kernels outside their memory. What a program computes is not judged here.
#pragma once

#include "spec.h"

namespace maml_fast {

// Throws std::invalid_argument that says which index or size of the description does not fit.
void check(const Spec& spec);

}  // namespace maml_fast
