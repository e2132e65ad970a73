// Runs a plan over all tasks on several threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "isa.h"
#include "layout.h"

namespace maml_fast {

// What took the time of one call, in nanoseconds. Together they are all of it.
struct Times {
    std::int64_t memory = 0, packing = 0;
    std::vector<std::int64_t> instructions;  // per instruction of the plan, a thread's share
    std::int64_t waiting = 0;                // of a thread: for others, and for its turn to add
    std::int64_t sums = 0;
};

// Fills `y`, of so many elements for each of the tasks from draw.task on, with random numbers.
template <class S>
void draw_tasks(Draw draw, long tasks, long elements, S* y);

// Memory of one call, reused by the next: shared panels, and a workspace and a partial sum per thread.
template <class S>
struct Memory;

// A plan ready to run. Calls from several threads at once are safe: each takes its own memory.
template <class S>
class Runner {
  public:
    Runner(Spec spec, Isa isa);
    ~Runner();
    void run(Call& call, Times* times = nullptr);
    const PlanView& view() const { return layout_.view(); }
    long bytes(int threads) const;
    long lanes() const { return kernels_.lanes; }

  private:
    std::unique_ptr<Memory<S>> borrow(int threads);
    void give_back(std::unique_ptr<Memory<S>> memory);
    void pack(const Call& call, S* arena);
    void reduce(const Call& call, const S* total);
    void add_up(const Call& call);
    void summon(int threads);
    void learn(long nanoseconds);

    const KernelsOf<S>& kernels_;
    Layout layout_;
    std::mutex mutex_;
    std::vector<std::unique_ptr<Memory<S>>> idle_;
    std::atomic<long> one_thread_{0};  // nanoseconds a call would take it, about; 0 before the first
};

}  // namespace maml_fast
