#include "levels.h"

namespace gemma {

namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
// Null where the compiler could not build the level, which native_library.py then leaves out.
namespace avx512_bf16 {
[[gnu::weak, gnu::visibility("default")]] void replace_products(Kernels&);
}
namespace amx {
[[gnu::weak, gnu::visibility("default")]] void replace_products(Kernels&);
}

Level built_level() {
    if (!avx512_bf16::replace_products) return Level::avx512;
    return amx::replace_products ? Level::amx : Level::avx512_bf16;
}

Kernels kernels_of(Level level) {
    if (level == Level::avx2) return avx2::kernels;
    Kernels kernels = avx512::kernels;
    if (level == Level::avx512_bf16) avx512_bf16::replace_products(kernels);
    if (level == Level::amx) amx::replace_products(kernels);
    return kernels;
}

}  // namespace gemma
