// AVX-512 F, BW, VL and DQ: Skylake-X, Ice Lake, Zen 4 and later.
#define GEMMA_LEVEL avx512
#include "level.h"
