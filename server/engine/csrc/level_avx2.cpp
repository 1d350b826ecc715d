// AVX2, FMA and F16C: every x86 server and laptop since 2013 (Haswell, Zen).
#define GEMMA_LEVEL avx2
#include "level.h"
