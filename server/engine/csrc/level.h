// All kernels at one level. A level's translation unit defines GEMMA_LEVEL and includes this.
#pragma once

#include "attention.h"
#include "elementwise.h"
#include "linear.h"
#include "sampling.h"

namespace gemma::GEMMA_LEVEL {

extern const Kernels kernels;
const Kernels kernels = {pack, embed, norm, geglu, convert, multiply, rotate, attend, merge, row_kernels};

}  // namespace gemma::GEMMA_LEVEL
