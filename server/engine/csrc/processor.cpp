// What the processor and the operating system offer. Bits: Intel's Software Developer's Manual, CPUID and XGETBV.

#include <cpuid.h>

#include "levels.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gemma {

namespace {

constexpr unsigned kTileConfig = 17, kTileData = 18;  // components of the state that XSAVE saves

bool has_bf16() {
    unsigned eax = 0, ebx, ecx, edx;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
}

bool has_tiles() {
    unsigned eax, ebx, ecx, edx = 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    const bool bf16 = edx >> 22 & 1, tiles = edx >> 24 & 1;
    if (!bf16 || !tiles) return false;
    unsigned low, high;  // of the components that the operating system saves
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low >> kTileConfig & 1) && (low >> kTileData & 1);
}

// Linux gives a process the 8 KiB of tiles only when it asks. Not in the headers of all C libraries:
// ARCH_REQ_XCOMP_PERM, Documentation/arch/x86/xstate.rst.
bool may_use_tiles() {
#if defined(__linux__)
    constexpr int kRequestPermission = 0x1023;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

}  // namespace

Level processor_level() {
    // These look at what the operating system saves, too.
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Level::none;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!avx512) return Level::avx2;
    if (!has_bf16() || !__builtin_cpu_supports("avx512vnni")) return Level::avx512;
    return has_tiles() && may_use_tiles() ? Level::amx : Level::avx512_bf16;
}

}  // namespace gemma
