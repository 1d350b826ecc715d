// The instruction set levels: which there are, and the kernels of each.
#pragma once

#include "calls.h"

namespace gemma {

// Each can do what the one before it can.
enum class Level : int32_t { none = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };

// The highest that the processor has and the operating system lets this process use.
Level processor_level();

// The highest that the compiler of this library knew.
Level built_level();

// level: neither none nor above the two others.
Kernels kernels_of(Level level);

}  // namespace gemma
