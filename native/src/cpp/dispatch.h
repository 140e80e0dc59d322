// Which of the compiled instruction sets is used: the best that this processor has, unless another is chosen.
#pragma once

#include "kernels.h"

namespace mam {

const Kernels& kernels();

// The sets that this processor has, the best last; null past the end.
const Kernels* available(int index);

// By name; false if this processor does not have it.
bool choose_kernels(const char* name);

}  // namespace mam
