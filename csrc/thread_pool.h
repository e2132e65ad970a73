// Threads for parallel loops over blocks of tasks.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace maml_fast {

// A call says summon(threads, how long it would take one thread), then any number of times run(threads, fn, context).
//
// run() calls fn(context, worker) on up to `threads` threads at once, the caller being worker 0, and returns
// when all of them have returned.
//
// fn must pull its work from a counter in `context` that all participants share, until nothing is left:
// any number of participants from 1 to `threads` may show up, each with its own index in [0, threads).
// When the caller's fn returns, helpers that have not come yet are no longer waited for; when the pool is
// busy (another thread's call, a call from inside fn) the caller does all the work alone. So fn must neither wait
// for the others nor split the work by their number. It must not throw.
//
// Helpers spin for a short while after a job, so that back-to-back calls reach them in well under a microsecond,
// and sleep afterwards. Waking one takes as long as a small call. A long call wakes them to join it, and so does a
// small one that follows another closely, for those after it; a small call after a pause wakes nobody.
// A helper leaves the processor that the caller is on: there it could only take the caller's place.
//
// They take over the caller's floating-point mode (flush-to-zero, rounding): results do not depend on who computed
// what. A forked child starts with an empty pool of its own.
class ThreadPool {
  public:
    using Function = void (*)(void* context, int worker);
    using Clock = std::chrono::steady_clock;

    static ThreadPool& instance();
    // Processors that this process may use: more threads would only take each other's place.
    static int processors();

    void summon(int threads, Clock::duration expected);
    void run(int threads, Function fn, void* context);

    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

  private:
    struct Lifetime;

    ThreadPool() = default;
    void grow(int helpers);
    int awake() const;
    void wake(int helpers);
    bool join_job();
    bool sleep();
    bool stand_apart() const;
    Clock::time_point begin_waiting(std::uint32_t& barred) const;
    void work();
    void shut_down();

    // The job on offer: its number in the upper half, the helpers still wanted in the lower. A helper joins by
    // lowering it by one, the caller ends the job by clearing the lower half; the number makes a late helper fail.
    alignas(64) std::atomic<std::uint64_t> offer_{0};
    Function fn_ = nullptr;
    void* context_ = nullptr;
    std::uint64_t fp_mode_ = 0;
    alignas(64) std::atomic<int> finished_{0};
    alignas(64) std::atomic<bool> busy_{false};
    std::atomic<Clock::duration::rep> ended_{0};  // the last job
    std::vector<std::thread> workers_;
    // What a call tells the helpers.
    alignas(64) std::atomic<std::uint32_t> call_{0};  // its number
    std::atomic<bool> long_{false};                   // whether those that wake up now are to join it
    std::atomic<int> processor_{-1};                  // where its caller runs
    alignas(64) std::atomic<int> helpers_{0};         // the size of workers_
    std::atomic<int> asleep_{0};                      // helpers that nobody is waking
    std::atomic<bool> stopping_{false};
    int woken_ = 0;  // helpers to wake up, under mutex_
    std::mutex mutex_;
    std::condition_variable summoned_;
};

}  // namespace maml_fast
