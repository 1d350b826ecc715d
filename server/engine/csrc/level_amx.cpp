// AMX with bf16: Sapphire Rapids and later. What differs from AVX-512 are products.
#define GEMMA_LEVEL amx
#include "amx.h"

namespace gemma::amx {

void replace_products(Kernels& kernels) {
    kernels.convert = convert_bf16;
    kernels.multiply = multiply_bf16<TileMultiplier>;
}

}  // namespace gemma::amx
