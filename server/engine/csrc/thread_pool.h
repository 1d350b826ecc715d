// Threads that share out the pieces of a piece of work.
//
// Laws:
// - Nobody waits for a thread that is not there: the caller works at once and a thread joins when it wakes, if any
//   pieces are left. A region ends when every piece is done. (On two cores of which another process has one, threads
//   that meet at barriers take longer together than one of them alone.)
// - A thread without work spins briefly, yielding, and then sleeps.
// - Which thread computes what never shows in a result.
// - All methods are defined in thread_pool.cpp: see calls.h for why.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace gemma {

class ThreadPool;

// One thread in a region.
class Team {
public:
    explicit Team(ThreadPool& pool);
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    // Threads that may take part, with this one.
    int size() const;

    // Takes the next `grain` of `total` pieces. False if none is left. In one region, all pass the same numbers.
    bool next(int64_t total, int64_t grain, int64_t& begin, int64_t& end);

    // At least `bytes` for this thread alone, aligned to 64, valid until its next call. Grows, never shrinks.
    void* scratch(size_t bytes);

private:
    ThreadPool& pool_;
    void* scratch_ = nullptr;
    size_t scratch_bytes_ = 0;
};

class ThreadPool {
public:
    // The calling thread is one of them, so `size - 1` are started.
    explicit ThreadPool(int size);
    ~ThreadPool();

    int size() const;

    // Runs function(team, argument) here and, if not `alone`, on every thread that comes in time; returns when all
    // of them have finished. The function takes pieces until there are none. One caller at a time.
    void run(void (*function)(Team&, const void*), const void* argument, bool alone);

private:
    friend class Team;
    struct State;
    std::unique_ptr<State> state_;
};

}  // namespace gemma
