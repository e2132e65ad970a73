#include "thread_pool.h"

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <csignal>
#include <new>
#include <system_error>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace maml_fast {
namespace {

// Longer would keep a core from PyTorch's own pool, shorter would let the helpers fall asleep between two
// calls of a training loop.
constexpr auto spin_time = std::chrono::microseconds(300);
// A call that one thread would take as long for is worth waking the helpers, which costs it tens of microseconds.
constexpr auto long_call = std::chrono::microseconds(500);
constexpr int pauses_per_look_at_clock = 32;
constexpr std::uint64_t wanted_mask = 0xffffffffu;

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("isb" ::: "memory");
#endif
}

// Only the control bits: exception flags left behind by one thread are no business of another.
inline std::uint64_t fp_mode() {
#if defined(__x86_64__)
    return _mm_getcsr() & ~0x3fu;
#elif defined(__aarch64__)
    std::uint64_t mode;
    __asm__ __volatile__("mrs %0, fpcr" : "=r"(mode));
    return mode;
#else
    return 0;
#endif
}

inline void set_fp_mode(std::uint64_t mode) {
    if (mode == fp_mode()) return;
#if defined(__x86_64__)
    _mm_setcsr(static_cast<unsigned>(mode));
#elif defined(__aarch64__)
    __asm__ __volatile__("msr fpcr, %0" ::"r"(mode));
#endif
}

// Where the calling thread runs; −1 where the system does not say.
inline int processor() {
#if defined(__linux__)
    return sched_getcpu();
#else
    return -1;
#endif
}

// Moves the calling thread to another processor, where it may stay or not; false if it has no other.
bool move_from(int processor) {
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return false;
    cpu_set_t others = allowed;
    CPU_CLR(static_cast<std::size_t>(processor), &others);
    if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof others, &others) != 0) return false;
    sched_setaffinity(0, sizeof allowed, &allowed);
    return true;
#else
    (void)processor;
    return false;
#endif
}

// Signals belong to the threads of the host program; those that report a crash stay open to its handlers.
class SignalsBlocked {
  public:
    SignalsBlocked() {
        sigset_t all;
        sigfillset(&all);
        for (const int crash : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP}) sigdelset(&all, crash);
        pthread_sigmask(SIG_SETMASK, &all, &before_);
    }
    ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

  private:
    sigset_t before_;
};

alignas(ThreadPool) unsigned char storage[sizeof(ThreadPool)];

ThreadPool& stored() { return *std::launder(reinterpret_cast<ThreadPool*>(storage)); }

}  // namespace

// The pool itself is never destroyed: a daemon thread may still be inside run() while the process exits.
struct ThreadPool::Lifetime {
    Lifetime() {
        new (storage) ThreadPool;
        // The child has none of the threads, and the locks may have been held: forget everything.
        pthread_atfork(nullptr, nullptr, [] { new (storage) ThreadPool; });
    }
    ~Lifetime() { stored().shut_down(); }
};

ThreadPool& ThreadPool::instance() {
    static Lifetime lifetime;
    return stored();
}

int ThreadPool::processors() {
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
#endif
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

void ThreadPool::summon(int threads, Clock::duration expected) {
    if (threads <= 1) return;
    const bool is_long = expected >= long_call;
    const auto ended = Clock::time_point(Clock::duration(ended_.load(std::memory_order_relaxed)));
    call_.fetch_add(1, std::memory_order_relaxed);
    long_.store(is_long, std::memory_order_relaxed);
    processor_.store(processor(), std::memory_order_relaxed);
    const int wanted = threads - 1;
    if (awake() >= wanted || (!is_long && Clock::now() - ended > spin_time)) return;
    if (busy_.load(std::memory_order_relaxed) || busy_.exchange(true, std::memory_order_acquire)) return;
    grow(wanted);
    if (awake() < wanted) wake(wanted - awake());
    busy_.store(false, std::memory_order_release);
}

void ThreadPool::run(int threads, Function fn, void* context) {
    const int helpers = std::min(threads - 1, helpers_.load(std::memory_order_relaxed));
    if (helpers <= 0 || busy_.load(std::memory_order_relaxed) || busy_.exchange(true, std::memory_order_acquire)) {
        fn(context, 0);
        ended_.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed);
        return;
    }
    const std::uint64_t number = (offer_.load(std::memory_order_relaxed) & ~wanted_mask) + wanted_mask + 1;
    fn_ = fn;
    context_ = context;
    fp_mode_ = fp_mode();
    finished_.store(0, std::memory_order_relaxed);
    offer_.store(number | static_cast<std::uint64_t>(helpers), std::memory_order_release);
    // Between two jobs of a long call they may have fallen asleep.
    if (long_.load(std::memory_order_relaxed) && awake() < helpers) wake(helpers - awake());

    fn(context, 0);

    const auto unclaimed = static_cast<int>(offer_.exchange(number, std::memory_order_acq_rel) & wanted_mask);
    const int joined = helpers - unclaimed;
    // A helper that has lost its core needs this one: from some point on give it away.
    for (int spins = 0; finished_.load(std::memory_order_acquire) != joined; ++spins) {
        if (spins < 1000) {
            pause();
        } else {
            std::this_thread::yield();
        }
    }
    ended_.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed);
    busy_.store(false, std::memory_order_release);
}

// A system that gives no more threads leaves us with fewer helpers.
void ThreadPool::grow(int helpers) {
    if (static_cast<int>(workers_.size()) >= helpers) return;
    const SignalsBlocked blocked;
    try {
        workers_.reserve(static_cast<std::size_t>(helpers));
        while (static_cast<int>(workers_.size()) < helpers) workers_.emplace_back(&ThreadPool::work, this);
    } catch (const std::system_error&) {
    } catch (const std::bad_alloc&) {
    }
    helpers_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
}

int ThreadPool::awake() const {
    return helpers_.load(std::memory_order_relaxed) - asleep_.load(std::memory_order_relaxed);
}

void ThreadPool::wake(int helpers) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        helpers = std::min(helpers, asleep_.load(std::memory_order_relaxed));
        woken_ += helpers;
        asleep_.fetch_sub(helpers, std::memory_order_relaxed);
    }
    for (int i = 0; i < helpers; ++i) summoned_.notify_one();
}

bool ThreadPool::join_job() {
    std::uint64_t offer = offer_.load(std::memory_order_relaxed);
    if ((offer & wanted_mask) == 0 || !stand_apart()) return false;
    if (!offer_.compare_exchange_strong(offer, offer - 1, std::memory_order_acquire, std::memory_order_relaxed)) {
        return true;  // somebody was faster: look again
    }
    set_fp_mode(fp_mode_);
    fn_(context_, static_cast<int>(offer & wanted_mask));
    finished_.fetch_add(1, std::memory_order_release);
    return true;
}

bool ThreadPool::sleep() {
    std::unique_lock<std::mutex> lock(mutex_);
    asleep_.fetch_add(1, std::memory_order_relaxed);
    summoned_.wait(lock, [this] { return stopping_.load(std::memory_order_relaxed) || woken_ > 0; });
    if (stopping_.load(std::memory_order_relaxed)) return false;
    --woken_;
    return true;
}

// On another processor than the caller.
bool ThreadPool::stand_apart() const {
    const int taken = processor_.load(std::memory_order_relaxed);
    return taken < 0 || processor() != taken || move_from(taken);
}

// A helper that wakes up in a short call would only come late and with cold caches: it waits for the next.
ThreadPool::Clock::time_point ThreadPool::begin_waiting(std::uint32_t& barred) const {
    barred = call_.load(std::memory_order_relaxed);
    if (!long_.load(std::memory_order_relaxed)) return Clock::now() + long_call;
    --barred;
    return Clock::now();
}

void ThreadPool::work() {
    std::uint32_t barred;
    auto idle_since = begin_waiting(barred);
    for (int pauses = 1;; ++pauses) {
        if (call_.load(std::memory_order_relaxed) != barred && join_job()) {
            idle_since = Clock::now();
            pauses = 0;
            continue;
        }
        pause();
        if (pauses % pauses_per_look_at_clock != 0) continue;
        if (stopping_.load(std::memory_order_relaxed)) return;
        if (Clock::now() - idle_since < spin_time && stand_apart()) continue;
        if (!sleep()) return;
        idle_since = begin_waiting(barred);
    }
}

// busy_ stays taken: whoever still calls works alone. A job that outlasts the wait is left to the process's end.
void ThreadPool::shut_down() {
    for (int waits = 0; busy_.exchange(true, std::memory_order_acquire); ++waits) {
        if (waits == 1000) return;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stopping_.store(true, std::memory_order_relaxed);
    }
    summoned_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

}  // namespace maml_fast
