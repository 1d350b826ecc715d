#include "thread_pool.h"

#include <immintrin.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <deque>
#include <new>
#include <thread>
#include <vector>

namespace gemma {

namespace {

// Some 50 microseconds: longer than the gap between two operations of a step, shorter than a time slice.
constexpr int kSpins = 2000;
constexpr int kSpinsBetweenYields = 64;

template <class T>
T wait_while_equal(const std::atomic<T>& value, T old) {
    for (int spin = 1; spin <= kSpins; ++spin) {
        const T now = value.load();
        if (now != old) return now;
        if (spin % kSpinsBetweenYields == 0)
            sched_yield();
        else
            _mm_pause();
    }
    value.wait(old);
    return value.load();
}

}  // namespace

struct ThreadPool::State {
    explicit State(int num_threads) : size(num_threads) {}

    const int size;
    void (*function)(Team&, const void*) = nullptr;
    const void* argument = nullptr;
    bool stopping = false;
    // On lines of their own, for they are written while others spin on their neighbours.
    alignas(64) std::atomic<uint32_t> region{0};  // counts openings and closings: odd while a region is open
    uint32_t opened = region - 1;                 // `region` as it was when the last one opened
    alignas(64) std::atomic<int> active{0};       // threads in it besides the caller's
    alignas(64) std::atomic<int64_t> cursor{0};
    std::deque<Team> teams;
    std::vector<std::thread> threads;

    // Once the pieces have run out, nobody else need come in. Does nothing if the region is closed already.
    void close() {
        uint32_t open = opened;
        region.compare_exchange_strong(open, open + 1);
    }

    void work(Team& team) {
        for (uint32_t seen = 0;;) {
            seen = wait_while_equal(region, seen);
            if (stopping) return;
            if (seen % 2 == 0) continue;
            // Announce first, then look again: the caller closes a region before it waits for the active ones, so
            // either it waits for this thread, or this thread sees that the region is closed.
            active.fetch_add(1);
            if (region.load() == seen) function(team, argument);
            if (active.fetch_sub(1) == 1) active.notify_all();
        }
    }
};

Team::Team(ThreadPool& pool) : pool_(pool) {}

Team::~Team() { std::free(scratch_); }

int Team::size() const { return pool_.state_->size; }

bool Team::next(int64_t total, int64_t grain, int64_t& begin, int64_t& end) {
    begin = pool_.state_->cursor.fetch_add(grain, std::memory_order_relaxed);
    end = std::min(begin + grain, total);
    if (begin + grain >= total) pool_.state_->close();
    return begin < total;
}

void* Team::scratch(size_t bytes) {
    if (bytes > scratch_bytes_) {
        std::free(scratch_);
        scratch_bytes_ = (bytes + 4095) / 4096 * 4096;
        scratch_ = std::aligned_alloc(64, scratch_bytes_);
        if (scratch_ == nullptr) throw std::bad_alloc();
    }
    return scratch_;
}

ThreadPool::ThreadPool(int size) : state_(std::make_unique<State>(std::max(size, 1))) {
    for (int index = 0; index < state_->size; ++index) state_->teams.emplace_back(*this);
    for (int index = 1; index < state_->size; ++index)
        state_->threads.emplace_back([&state = *state_, index] { state.work(state.teams[size_t(index)]); });
}

ThreadPool::~ThreadPool() {
    state_->stopping = true;
    state_->region.fetch_add(2);
    state_->region.notify_all();
    for (std::thread& thread : state_->threads) thread.join();
}

int ThreadPool::size() const { return state_->size; }

void ThreadPool::run(void (*function)(Team&, const void*), const void* argument, bool alone) {
    State& state = *state_;
    state.cursor.store(0);
    if (alone || state.size == 1) return function(state.teams[0], argument);
    state.function = function;
    state.argument = argument;
    state.opened = state.region.load() + 1;
    state.region.store(state.opened);
    state.region.notify_all();
    function(state.teams[0], argument);
    state.close();
    for (int active; (active = state.active.load()) != 0;) wait_while_equal(state.active, active);
}

}  // namespace gemma
