// AVX512_BF16 and AVX512_VNNI: Cooper Lake, Sapphire Rapids, Zen 4 and later. What differs from AVX-512 are products.
#define GEMMA_LEVEL avx512_bf16
#include "dot_bf16.h"

namespace gemma::avx512_bf16 {

void replace_products(Kernels& kernels) {
    kernels.convert = convert_bf16;
    kernels.multiply = multiply_bf16<DotMultiplier>;
}

}  // namespace gemma::avx512_bf16
