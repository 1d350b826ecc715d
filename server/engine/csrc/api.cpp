// The C functions that Python calls. One call at a time for an engine, which runs on all of its threads.
//
// Pointers are to contiguous arrays that outlive the call. Nothing here checks shapes: native.py does.

#include "levels.h"
#include "program.h"

using gemma::Engine;

#pragma GCC visibility push(default)
extern "C" {

// Levels are numbered as in levels.h.
int32_t gemma_processor_level() { return int32_t(gemma::processor_level()); }

int32_t gemma_built_level() { return int32_t(gemma::built_level()); }

// level: at most the two above. Null if memory is short, or no thread can be started.
void* gemma_create(int32_t level, int32_t threads) try {
    return new Engine(gemma::kernels_of(gemma::Level(level)), threads);
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

// A row of logits is one thread's.
void gemma_sample(void* engine, gemma::SampleCall* call) {
    Engine& self = *static_cast<Engine*>(engine);
    call->kernels = &self.kernels.rows;
    self.run<gemma::SampleCall>(gemma::sample, *call, call->rows > 1 ? call->rows * call->columns : 0);
}

void gemma_logprobs(void* engine, gemma::LogprobsCall* call) {
    Engine& self = *static_cast<Engine*>(engine);
    call->kernels = &self.kernels.rows;
    self.run<gemma::LogprobsCall>(gemma::logprobs, *call, call->rows > 1 ? call->rows * call->columns : 0);
}

}  // extern "C"
#pragma GCC visibility pop
