// Stress test of the thread pool, without Python: thread_pool_test [rounds] [threads].
// Exits with 1 at the first wrong count; prints the latencies of `threads` threads where that is given.
#include "../thread_pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace {

using maml_fast::ThreadPool;
using Clock = ThreadPool::Clock;
using namespace std::chrono_literals;

void check(bool good, const char* what) {
    if (good) return;
    std::fprintf(stderr, "thread_pool_test: failed: %s\n", what);
    std::fflush(stderr);
    std::_Exit(1);
}

struct Job {
    explicit Job(int n, int t)
        : blocks(n), threads(t), done(static_cast<std::size_t>(n)), seen(static_cast<std::size_t>(t)) {}
    int blocks;
    int threads;
    std::atomic<int> next{0};
    std::vector<int> done;  // plain on purpose: a missing synchronisation is for the thread sanitizer to see
    std::vector<int> seen;
    bool nested = false;
};

constexpr auto long_call = Clock::duration(1s), short_call = Clock::duration(10us);

void run(int threads, int blocks, bool nested = false, Clock::duration expected = long_call);

void take_blocks(void* context, int worker) {
    Job& job = *static_cast<Job*>(context);
    check(worker >= 0 && worker < job.threads, "worker index in range");
    ++job.seen[static_cast<std::size_t>(worker)];
    for (int block; (block = job.next.fetch_add(1, std::memory_order_relaxed)) < job.blocks;) {
        ++job.done[static_cast<std::size_t>(block)];
        if (job.nested) run(3, 5);
    }
}

void run(int threads, int blocks, bool nested, Clock::duration expected) {
    Job job(blocks, threads);
    job.nested = nested;
    ThreadPool::instance().summon(threads, expected);
    ThreadPool::instance().run(threads, take_blocks, &job);
    check(std::all_of(job.done.begin(), job.done.end(), [](int n) { return n == 1; }), "every block exactly once");
    check(std::all_of(job.seen.begin(), job.seen.end(), [](int n) { return n <= 1; }), "every worker at most once");
    check(job.seen[0] == 1, "the caller takes part");
}

// The thread sanitizer does not know threads that a forked child starts. The address sanitizer's allocator may
// stay locked for ever in a child forked while another thread allocates.
#if defined(__has_feature)
#define MAML_FAST_HAS(feature) __has_feature(feature)
#else
#define MAML_FAST_HAS(feature) 0
#endif
#if defined(__SANITIZE_THREAD__) || MAML_FAST_HAS(thread_sanitizer)
#define MAML_FAST_TSAN
#endif
#if defined(__SANITIZE_ADDRESS__) || MAML_FAST_HAS(address_sanitizer)
constexpr bool fork_among_threads = false;
#else
constexpr bool fork_among_threads = true;
#endif
#ifdef MAML_FAST_TSAN
void in_child(int) {}
#else
void in_child(int rounds) {
    const pid_t child = fork();
    check(child >= 0, "fork");
    if (child == 0) {
        for (int i = 0; i < rounds; ++i) run(1 + i % 4, i % 23);
        std::exit(0);  // with the handlers: the child's own helpers must be joined
    }
    int status = 0;
    waitpid(child, &status, 0);
    check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child can use the pool");
}
#endif

#if defined(__x86_64__)
struct Modes {
    std::atomic<int> arrived{0};
    std::atomic<int> flushing{0};
};

void report_mode(void* context, int) {
    Modes& modes = *static_cast<Modes*>(context);
    modes.flushing += (_mm_getcsr() & 0x8000u) != 0;
    ++modes.arrived;
    while (modes.arrived.load() < 2) std::this_thread::yield();  // allowed here only: nobody else uses the pool
}

void floating_point_mode() {
    const unsigned before = _mm_getcsr();
    for (const unsigned flush : {0x8000u, 0u}) {
        Modes modes;
        _mm_setcsr((before & ~0x8000u) | flush);
        ThreadPool::instance().summon(2, long_call);
        ThreadPool::instance().run(2, report_mode, &modes);
        check(modes.flushing == (flush != 0 ? 2 : 0), "helpers take over the caller's floating-point mode");
    }
    _mm_setcsr(before);
}
#endif

struct Company {
    Clock::time_point until;
    bool helped = false;
};

void stay(void* context, int worker) {
    Company& company = *static_cast<Company*>(context);
    if (worker != 0) company.helped = true;  // plain: run() returns after it, or it never comes
    while (Clock::now() < company.until) std::this_thread::yield();
}

bool helped(Clock::duration expected, Clock::duration length) {
    Company company;
    company.until = Clock::now() + length;
    ThreadPool::instance().summon(2, expected);
    ThreadPool::instance().run(2, stay, &company);
    return company.helped;
}

// A short call after a pause is the caller's alone, and so is the next, which wakes a helper for those that follow
// closely; a long one is shared at once.
void short_calls() {
    if (ThreadPool::processors() < 2) return;
    int firsts = 0, followers = 0;  // on a busy machine a helper may take long to fall asleep
    for (int i = 0; i < 50; ++i) {
        std::this_thread::sleep_for(20ms);
        firsts += helped(short_call, 100us);
        firsts += helped(short_call, 100us);
        for (int j = 0; j < 5; ++j) followers += helped(short_call, 100us);
    }
    check(firsts < 10, "short calls after a pause have no helper");
    check(followers > 0, "short calls that follow each other closely are shared");
    std::this_thread::sleep_for(20ms);
    int tries = 1;
    while (!helped(long_call, 20ms)) check(++tries < 50, "a long call after a pause is shared");
    std::this_thread::sleep_for(20ms);
    bool late = false;
    for (tries = 0; !late; ++tries) {  // no summon(): the call is still the same
        check(tries < 50, "a job after a long pause within a long call is shared");
        std::this_thread::sleep_for(20ms);
        Company company;
        company.until = Clock::now() + 20ms;
        ThreadPool::instance().run(2, stay, &company);
        late = company.helped;
    }
}

struct Meeting {
    int threads;
    std::atomic<int> arrived{0};
};

void meet(void* context, int) {
    Meeting& meeting = *static_cast<Meeting*>(context);
    ++meeting.arrived;
    for (int spins = 0; meeting.arrived.load() < meeting.threads; ++spins) {
        if (spins > 100000) std::this_thread::yield();
    }
}

void nothing(void*, int) {}

// Median and 99th percentile of a call that does nothing, and of one that waits until all threads have come.
void latency(const char* label, int threads, ThreadPool::Function fn, int gap_us, int rounds) {
    std::vector<double> us;
    for (int i = 0; i < rounds; ++i) {
        if (gap_us >= 1000) {
            std::this_thread::sleep_for(std::chrono::microseconds(gap_us));
        } else {
            for (const auto until = Clock::now() + std::chrono::microseconds(gap_us); Clock::now() < until;) {
            }
        }
        Meeting meeting{threads};
        const auto start = Clock::now();
        ThreadPool::instance().summon(threads, long_call);
        ThreadPool::instance().run(threads, fn, &meeting);
        us.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
    }
    std::sort(us.begin(), us.end());
    std::printf("%-34s threads %d  gap %5d us  min %7.2f  median %7.2f  p99 %8.2f us\n", label, threads, gap_us, us[0],
                us[us.size() / 2], us[us.size() * 99 / 100]);
}

}  // namespace

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 20000;
    in_child(10);  // before the parent has a pool
    for (int i = 0; i < rounds; ++i) run(1 + i % 5, i % 37);
    for (int i = 0; i < 50; ++i) {  // helpers asleep, or just about to be
        std::this_thread::sleep_for(std::chrono::microseconds(20 * (i % 12)));
        run(1 + i % 6, 64);
    }
    for (int i = 0; i < 200; ++i) run(3, 20, /*nested=*/true);
    short_calls();
#if defined(__x86_64__)
    floating_point_mode();
#endif
    in_child(100);
    {
        std::atomic<bool> stop{false};
        std::vector<std::thread> callers;
        for (int c = 0; c < 4; ++c) {
            callers.emplace_back([&, c] {
                for (int i = 0; !stop; ++i) run(2 + (c + i) % 4, 1 + i % 50);
            });
        }
        for (int i = 0; i < 10; ++i) {
            std::this_thread::sleep_for(std::chrono::milliseconds(5));
            if (fork_among_threads) in_child(20);  // while others are inside run(), locks and all
        }
        stop = true;
        for (std::thread& caller : callers) caller.join();
    }
    if (argc > 2) {
        const int threads = std::atoi(argv[2]);
        latency("empty, back to back", threads, nothing, 0, 100000);
        latency("all threads meet, back to back", threads, meet, 0, 100000);
        latency("all threads meet, after a gap", threads, meet, 50, 5000);
        latency("all threads meet, asleep", threads, meet, 1000, 500);
        latency("empty, asleep", threads, nothing, 1000, 500);
    }
    std::puts("thread_pool_test: ok");
    return 0;
}
