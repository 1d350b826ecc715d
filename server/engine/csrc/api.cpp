// The C functions that Python calls, each an operation on all threads of an engine.
//
// Pointers are to contiguous arrays that outlive the call. Nothing here checks shapes: native.py does.

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "calls.h"
#include "thread_pool.h"

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

// Scratch that an operation's threads share. Grows, never shrinks.
class Buffer {
public:
    float* floats(size_t count) {
        if (count > size_) {
            memory_.reset();
            size_ = (count + 1023) / 1024 * 1024;
            memory_.reset(static_cast<float*>(std::aligned_alloc(64, size_ * sizeof(float))));
            if (!memory_) throw std::bad_alloc();
        }
        return memory_.get();
    }

private:
    struct Free {
        void operator()(float* memory) const { std::free(memory); }
    };
    std::unique_ptr<float, Free> memory_;
    size_t size_ = 0;
};

constexpr int64_t kWorthSharing = 1 << 14;

struct Engine {
    Engine(const Kernels& level, int threads) : kernels(level), pool(threads) {}

    // amount: the numbers that the kernel reads, roughly. Below some, waking a thread costs more than it saves.
    template <class Call>
    void run(void (*kernel)(Team&, const Call&), const Call& call, int64_t amount) {
        struct Job {
            void (*kernel)(Team&, const Call&);
            const Call& call;
        } job{kernel, call};
        pool.run(
            [](Team& team, const void* argument) {
                const Job& job = *static_cast<const Job*>(argument);
                job.kernel(team, job.call);
            },
            &job, amount < kWorthSharing
        );
    }

    const Kernels& kernels;
    ThreadPool pool;
    Buffer rows;      // of a linear layer in fp32, or an attention's queries
    Buffer partials;  // of attention
    std::vector<AttentionItem> items, split;
};

// Cuts a step's attention into items, several for each thread where that is possible. Returns the spans of all.
int64_t plan(Engine& engine, AttentionCall& call) {
    const int64_t group = call.heads / call.kv_heads;
    const int64_t tile = std::max<int64_t>(1, kTileRows / group);
    std::vector<AttentionItem>& items = engine.items;
    items.clear();
    engine.split.clear();
    for (int32_t sequence = 0; sequence < call.sequences; ++sequence) {
        const int32_t begin = call.query_start[sequence], end = call.query_start[sequence + 1];
        const int32_t computed = call.seq_lens[sequence] - (end - begin);
        for (int32_t row = begin; row < end; row += int32_t(tile)) {
            const int32_t rows = std::min<int32_t>(int32_t(tile), end - row);
            const int32_t first = computed + row - begin, last = first + rows - 1;
            const int32_t oldest = call.window > 0 ? std::max(0, first - call.window + 1) : 0;
            for (int32_t head = 0; head < call.kv_heads; ++head)
                items.push_back({sequence, head, row, rows, oldest / kSpan, last / kSpan + 1, -1});
        }
    }

    const int64_t wanted = 4 * engine.pool.size();
    const int64_t pieces = (wanted + int64_t(items.size()) - 1) / std::max<int64_t>(1, int64_t(items.size()));
    int64_t partials = 0, most_rows = 0;
    if (pieces > 1 && engine.pool.size() > 1) {
        std::vector<AttentionItem> whole;
        whole.swap(items);
        for (AttentionItem item : whole) {
            const int32_t spans = item.end_span - item.first_span;
            if (spans == 1) {
                items.push_back(item);
                continue;
            }
            item.partial = partials;
            engine.split.push_back(item);
            partials += spans;
            most_rows = std::max<int64_t>(most_rows, item.num_rows * group);
            const int32_t each = int32_t((spans + pieces - 1) / pieces);
            for (int32_t span = item.first_span; span < item.end_span; span += each) {
                AttentionItem piece = item;
                piece.first_span = span;
                piece.end_span = std::min(span + each, item.end_span);
                piece.partial = item.partial + span - item.first_span;
                items.push_back(piece);
            }
        }
    }
    // The largest first, so that the threads end together.
    std::stable_sort(items.begin(), items.end(), [](const AttentionItem& a, const AttentionItem& b) {
        return a.num_rows * (a.end_span - a.first_span) > b.num_rows * (b.end_span - b.first_span);
    });

    const int64_t padded = (call.head_dim + kPanel - 1) / kPanel * kPanel;
    call.q = engine.rows.floats(size_t(call.tokens * call.heads * padded));
    call.partial_stride = most_rows * (padded + 2);
    call.partials = engine.partials.floats(size_t(partials * call.partial_stride));
    call.items = items.data();
    call.num_items = int64_t(items.size());
    call.split = engine.split.data();
    call.num_split = int64_t(engine.split.size());
    int64_t spans = 0;
    for (const AttentionItem& item : items) spans += item.end_span - item.first_span;
    return spans;
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
    const bool bf16 = gemma::Type(type) == gemma::Type::bf16;
    const int64_t panels = (outputs + gemma::kPanel - 1) / gemma::kPanel;
    return panels * gemma::kPanel * (bf16 ? (inputs + 1) / 2 * 2 * 2 : inputs * 4);
}

void gemma_pack(void* engine, const gemma::PackCall* call) {
    Engine& self = *static_cast<Engine*>(engine);
    self.run(self.kernels.pack, *call, call->outputs * call->inputs);
}

void gemma_embed(void* engine, const gemma::EmbedCall* call) {
    Engine& self = *static_cast<Engine*>(engine);
    self.run(self.kernels.embed, *call, call->rows * call->inputs);
}

void gemma_linear(void* engine, gemma::LinearCall* call) {
    Engine& self = *static_cast<Engine*>(engine);
    call->x32 = self.rows.floats(size_t(call->rows * gemma::linear_stride(call->inputs)));
    self.run<gemma::LinearCall>(self.kernels.convert, *call, call->rows * call->inputs);
    self.run<gemma::LinearCall>(self.kernels.multiply, *call, call->outputs * call->inputs);
}

void gemma_norm(void* engine, const gemma::NormCall* call) {
    Engine& self = *static_cast<Engine*>(engine);
    self.run(self.kernels.norm, *call, call->rows * call->width);
}

void gemma_geglu(void* engine, const gemma::GegluCall* call) {
    Engine& self = *static_cast<Engine*>(engine);
    self.run(self.kernels.geglu, *call, 2 * call->rows * call->width);
}

void gemma_attention(void* engine, gemma::AttentionCall* call) {
    Engine& self = *static_cast<Engine*>(engine);
    const int64_t spans = gemma::plan(self, *call);
    const int64_t width = call->head_dim * (call->heads + 2 * call->kv_heads);
    self.run<gemma::AttentionCall>(self.kernels.rotate, *call, call->tokens * width);
    self.run<gemma::AttentionCall>(self.kernels.attend, *call, spans * gemma::kSpan * 2 * call->head_dim);
    if (call->num_split > 0)
        self.run<gemma::AttentionCall>(self.kernels.merge, *call, spans * call->head_dim);
}

}  // extern "C"
#pragma GCC visibility pop
