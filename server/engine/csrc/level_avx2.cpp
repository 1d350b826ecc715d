// AVX2 and FMA: every x86 server and laptop since 2013 (Haswell, Zen).
#define GEMMA_LEVEL avx2
#include "level.h"
