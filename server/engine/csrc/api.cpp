// The C functions that Python calls. One call at a time for an engine, which runs on all of its threads.
//
// Pointers are to contiguous arrays that outlive the call. Nothing here checks shapes: native.py does.

#include "program.h"

namespace gemma {

namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}

namespace {

enum class Level : int32_t { none = 0, avx2 = 1, avx512 = 2 };

// The highest level that this processor and this operating system have.
Level best_level() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Level::none;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return avx512 ? Level::avx512 : Level::avx2;
}

}  // namespace
}  // namespace gemma

using gemma::Engine;
using gemma::Level;

#pragma GCC visibility push(default)
extern "C" {

// 0: none, 1: AVX2, 2: AVX-512.
int32_t gemma_best_level() { return int32_t(gemma::best_level()); }

// Null if the processor lacks the level, or memory is short.
void* gemma_create(int32_t level, int32_t threads) try {
    if (level < 1 || level > gemma_best_level()) return nullptr;
    return new Engine(Level(level) == Level::avx512 ? gemma::avx512::kernels : gemma::avx2::kernels, threads);
} catch (...) {
    return nullptr;
}

void gemma_destroy(void* engine) { delete static_cast<Engine*>(engine); }

// Bytes of a packed matrix.
int64_t gemma_packed_size(int32_t type, int64_t outputs, int64_t inputs) {
    const int64_t panels = (outputs + gemma::kPanel - 1) / gemma::kPanel;
    const auto bytes_of_output = [&] {
        switch (gemma::Type(type)) {
            case gemma::Type::bf16: return (inputs + 1) / 2 * 4;
            case gemma::Type::int8: return (inputs + 3) / 4 * 4 + int64_t(sizeof(float));
            default: return inputs * 4;
        }
    };
    return panels * gemma::kPanel * bytes_of_output();
}

void gemma_pack(void* engine, const gemma::PackCall* call) {
    Engine& self = *static_cast<Engine*>(engine);
    self.run(self.kernels.pack, *call, call->outputs * call->inputs);
}

// Runs a recorded step.
void gemma_run(void* engine, const gemma::Program* program, const gemma::StepCall* step) {
    gemma::run_program(*static_cast<Engine*>(engine), *program, *step);
}

// One product by itself: the logits.
void gemma_linear(void* engine, const gemma::LinearCall* call) {
    gemma::run_linear(*static_cast<Engine*>(engine), *call);
}

}  // extern "C"
#pragma GCC visibility pop
