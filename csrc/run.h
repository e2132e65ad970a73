// Runs a plan over all tasks on several threads.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "isa.h"
#include "layout.h"

namespace maml_fast {

// Memory of one call, reused by the next: shared panels, a workspace and a partial sum a thread.
template <class S>
struct Memory;

// A plan ready to run. Calls from several threads at once are safe: each takes its own memory.
template <class S>
class Runner {
  public:
    Runner(Spec spec, Isa isa);
    ~Runner();
    void run(Call& call);
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
