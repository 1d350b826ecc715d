// An engine: the kernels of one level, the threads that run them, and the scratch memory of one step.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "calls.h"
#include "thread_pool.h"

namespace gemma {

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

// How a step's attention is cut into pieces of work; the same for all layers of a group.
struct AttentionPlan {
    std::vector<AttentionItem> items, split;
    int64_t num_partials = 0, most_split_rows = 0;
    int64_t spans = 0;  // of all items
};

// Amounts of work below this are done by the calling thread: waking another costs more than it saves.
constexpr int64_t kWorthSharing = 1 << 14;

struct Engine {
    Engine(const Kernels& level, int threads) : kernels(level), pool(threads) {}

    // amount: the numbers that the kernel reads, roughly.
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

    const Kernels kernels;
    ThreadPool pool;
    Buffer rows;      // of a linear layer in fp32, or an attention's queries
    Buffer partials;  // of attention
    Buffer angles;    // of the step's positions
    std::vector<AttentionPlan> plans;  // of the step, by group
};

}  // namespace gemma
