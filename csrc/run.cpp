#include "run.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <limits>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>

#include "thread_pool.h"

namespace maml_fast {

namespace {

template <class S>
const KernelsOf<S>& kernels_for(Isa isa) {
#if defined(__x86_64__) && !defined(MAML_FAST_BASELINE)
    if (isa == Isa::avx512) return kernels_avx512(S());
    if (isa == Isa::avx2) return kernels_avx2(S());
#else
    (void)isa;
#endif
    return kernels_baseline(S());
}

constexpr std::size_t kLine = 64;
constexpr long kParallelPack = 1 << 15;  // numbers from which packing is worth waking the threads

template <class S>
struct Free {
    void operator()(S* p) const { std::free(p); }
};
template <class S>
using Buffer = std::unique_ptr<S[], Free<S>>;

template <class S>
Buffer<S> allocate(long count) {
    std::size_t bytes = (std::size_t(count) * sizeof(S) + kLine) / kLine * kLine;
    S* p = static_cast<S*>(std::aligned_alloc(kLine, bytes));
    if (!p) throw std::bad_alloc();
    return Buffer<S>(p);
}

}  // namespace

template <class S>
struct Memory {
    Buffer<S> arena, total, losses;
    std::vector<Buffer<S>> workspaces, partials;
};

namespace {

// What the threads of one call share.
template <class S>
struct Job {
    const KernelsOf<S>& kernels;
    const PlanView& plan;
    const Call& call;
    Memory<S>& memory;
    long blocks, sums;
    std::atomic<long> next{0};
    std::atomic<long> turn{0};
    std::atomic<long> nanoseconds{0};  // that the threads took together

    void work(int worker) {
        const auto start = ThreadPool::Clock::now();
        S *workspace = memory.workspaces[worker].get(), *partial = memory.partials[worker].get();
        Call own = call;
        if (own.clock) own.spent += std::ptrdiff_t(worker) * plan.n_code;
        for (long block; (block = next.fetch_add(1, std::memory_order_relaxed)) < blocks;) {
            long first = block * call.tasks / blocks, last = (block + 1) * call.tasks / blocks;
            for (long i = 0; i < sums; ++i) partial[i] = S(0);
            kernels.block(plan, own, memory.arena.get(), workspace, partial, first, last - first);
            add_in_order(block, partial);
        }
        nanoseconds += std::chrono::nanoseconds(ThreadPool::Clock::now() - start).count();
    }

    // Blocks are claimed in order by running threads, so whoever is waited for is on the way.
    void add_in_order(long block, const S* partial) {
        if (sums == 0) return;
        for (int spins = 0; turn.load(std::memory_order_acquire) != block; ++spins)
            if (spins > 1000) std::this_thread::yield();
        S* total = memory.total.get();
        if (block == 0)
            for (long i = 0; i < sums; ++i) total[i] = partial[i];
        else
            for (long i = 0; i < sums; ++i) total[i] += partial[i];
        turn.store(block + 1, std::memory_order_release);
    }
};

template <class S>
struct PackJob {
    const KernelsOf<S>& kernels;
    const PlanView& plan;
    const Call& call;
    S* arena;
    std::atomic<int> next{0};

    void work() {
        for (int op; (op = next.fetch_add(1, std::memory_order_relaxed)) < plan.n_ops;)
            kernels.pack(plan, call, op, arena);
    }
};

std::int64_t now() {
    using namespace std::chrono;
    return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

// Time since the last lap, for calls that are measured.
class Stopwatch {
  public:
    explicit Stopwatch(bool used) : last_(used ? now() : 0) {}
    std::int64_t lap() {
        std::int64_t before = last_;
        return (last_ = now()) - before;
    }

  private:
    std::int64_t last_;
};

// What every instruction took and the rest of `wall`, as means over the threads that took part.
void share_out(const std::vector<std::int64_t>& spent, std::size_t instructions, std::int64_t wall, Times& times) {
    std::int64_t workers = 0;
    times.instructions.assign(instructions, 0);
    for (auto begin = spent.begin(); begin != spent.end(); begin += std::ptrdiff_t(instructions)) {
        std::transform(times.instructions.begin(), times.instructions.end(), begin, times.instructions.begin(),
                       std::plus<>());
        workers += std::any_of(begin, begin + std::ptrdiff_t(instructions), [](std::int64_t ns) { return ns > 0; });
    }
    for (std::int64_t& ns : times.instructions) ns /= std::max<std::int64_t>(workers, 1);
    times.waiting = std::accumulate(times.instructions.begin(), times.instructions.end(), wall, std::minus<>());
}

bool poisoned() {
    const char* value = std::getenv("MAML_FAST_POISON");
    return value && *value == '1';
}

template <class S>
void poison(Memory<S>& memory, const PlanView& plan) {
    const S nan = std::numeric_limits<S>::quiet_NaN();
    std::fill_n(memory.arena.get(), plan.packed, nan);
    for (auto& w : memory.workspaces) std::fill_n(w.get(), plan.workspace, nan);
}

}  // namespace

template <class S>
Runner<S>::Runner(Spec spec, Isa isa)
    : kernels_(kernels_for<S>(isa)),
      layout_(std::move(spec), Machine{kernels_.lanes, kernels_.gemm_depth, long(sizeof(S))}) {}

template <class S>
Runner<S>::~Runner() = default;

template <class S>
long Runner<S>::bytes(int threads) const {
    const PlanView& plan = layout_.view();
    long sums = plan.sums + plan.rates;
    return long(sizeof(S)) * (plan.packed + sums + threads * (plan.workspace + sums));
}

template <class S>
std::unique_ptr<Memory<S>> Runner<S>::borrow(int threads) {
    const PlanView& plan = layout_.view();
    std::unique_ptr<Memory<S>> memory;
    {
        // only tried: a thread of the parent that held the lock is gone in a forked child
        std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
        if (lock && !idle_.empty()) {
            memory = std::move(idle_.back());
            idle_.pop_back();
        }
    }
    long sums = plan.sums + plan.rates;
    if (!memory) {
        memory = std::make_unique<Memory<S>>();
        memory->arena = allocate<S>(plan.packed);
        memory->total = allocate<S>(sums);
        memory->losses = allocate<S>(plan.tasks);
    }
    while (int(memory->workspaces.size()) < threads) {
        memory->workspaces.push_back(allocate<S>(plan.workspace));
        memory->partials.push_back(allocate<S>(sums));
    }
    static const bool poison_memory = poisoned();
    if (poison_memory) poison(*memory, plan);
    return memory;
}

template <class S>
void Runner<S>::give_back(std::unique_ptr<Memory<S>> memory) {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (lock) idle_.push_back(std::move(memory));
}

template <class S>
void Runner<S>::pack(const Call& call, S* arena) {
    const PlanView& plan = layout_.view();
    PackJob<S> job{kernels_, plan, call, arena};
    if (plan.packed < kParallelPack) return job.work();
    ThreadPool::instance().run(call.threads, [](void* c, int) { static_cast<PackJob<S>*>(c)->work(); }, &job);
}

template <class S>
void Runner<S>::summon(int threads) {
    const long known = one_thread_.load(std::memory_order_relaxed);
    ThreadPool::instance().summon(threads,
                                  known ? std::chrono::nanoseconds(known) : ThreadPool::Clock::duration::max());
}

// Other programs make a call longer, nothing makes it shorter: the least is believed at once, more little by little.
template <class S>
void Runner<S>::learn(long nanoseconds) {
    const long known = one_thread_.load(std::memory_order_relaxed);
    if (known && nanoseconds > known) nanoseconds = std::min(nanoseconds, known + known / 8 + 1);
    one_thread_.store(nanoseconds, std::memory_order_relaxed);
}

template <class S>
void Runner<S>::run(Call& call, Times* times) {
    const PlanView& plan = layout_.view();
    Stopwatch watch(times != nullptr);
    long blocks = plan.blocks;
    if (call.threads > 1) call.threads = std::min(call.threads, ThreadPool::processors());
    bool shared = call.tasks < call.threads;  // too few tasks: the threads share each of them
    call.team = shared ? call.threads : 1;
    call.parallel = [](int threads, void (*fn)(void*, int), void* context) {
        ThreadPool::instance().run(threads, fn, context);
    };
    if (shared) call.threads = 1;
    if (call.threads > blocks) call.threads = int(blocks);
    summon(shared ? call.team : call.threads);
    auto memory = borrow(call.threads);
    if (times) times->memory = watch.lap();
    if (call.objective) call.losses = memory->losses.get();
    pack(call, memory->arena.get());
    std::vector<std::int64_t> spent;
    if (times) {
        times->packing = watch.lap();
        spent.resize(std::size_t(call.threads) * std::size_t(plan.n_code));
        call.clock = now;
        call.spent = spent.data();
    }
    Job<S> job{kernels_, plan, call, *memory, blocks, call.gradients ? plan.sums + plan.rates : 0};
    ThreadPool::instance().run(call.threads, [](void* c, int worker) { static_cast<Job<S>*>(c)->work(worker); }, &job);
    if (times) share_out(spent, std::size_t(plan.n_code), watch.lap(), *times);
    learn(job.nanoseconds);
    if (call.outside[1]) {
        give_back(std::move(memory));
        if (call.outside[1] == kUnset)
            throw std::invalid_argument(
                "model: expected what PyTorch's own checks accept (torch.distributions, one_hot, gaussian_nll_loss; "
                "indices of gather and scatter)");
        throw std::out_of_range("model: expected indices in [0, " + std::to_string(call.outside[1]) + "), got " +
                                std::to_string(call.outside[0]));
    }
    if (call.gradients) reduce(call, memory->total.get());
    if (call.objective) add_up(call);
    if (times) times->sums = watch.lap();
    give_back(std::move(memory));
}

// Numbers in the order of the kernels to the caller's order, which differs for convolutions.
template <class S>
void unpack_gradients(const Param& p, const S* from, bool add, S* to) {
    if (!p.taps) {
        for (long i = 0; i < p.size; ++i) to[i] = add ? to[i] + from[i] : from[i];
        return;
    }
    for (long o = 0; o < p.o; ++o)
        for (long c = 0; c < p.c; ++c)
            for (long t = 0; t < p.taps; ++t, ++to) {
                S value = from[(t * p.c + c) * p.o + o];
                *to = add ? *to + value : value;
            }
}

// Unpacks the sums over tasks into the caller's gradient tensors.
template <class S>
void Runner<S>::reduce(const Call& call, const S* total) {
    const PlanView& plan = layout_.view();
    for (int p = 0; p < plan.n_params; ++p) {
        S* to = static_cast<S*>(call.gradients[p]);
        const Param& param = plan.params[p];
        if (!to || param.sum < 0) continue;
        unpack_gradients(param, total + param.sum, call.add, to);
    }
    S* rates = static_cast<S*>(call.rate_gradient);
    if (!rates) return;
    for (long i = 0; i < plan.rates; ++i) rates[i] = total[plan.sums + i];
    for (int p = 0; p < plan.n_params; ++p)
        for (int set = 0; set < plan.rate_sets; ++set) {
            const RateOf& rate = plan.params[p].rates[set];
            if (rate.packed < 0) continue;
            long offset = plan.rate_offset[rate.index];
            unpack_gradients(plan.params[p], total + plan.sums + offset, false, rates + offset);
        }
}

// The objective Σ_t w_t L_t.
template <class S>
void Runner<S>::add_up(const Call& call) {
    const S *losses = static_cast<const S*>(call.losses), *weights = static_cast<const S*>(call.weights);
    S sum = S(0);
    for (long t = 0; t < call.tasks; ++t) sum += weights[t] * losses[t];
    *static_cast<S*>(call.objective) = sum;
}

template <class S>
void draw_tasks(Draw draw, long tasks, long elements, S* y) {
    const KernelsOf<S>& kernels = kernels_for<S>(choose());
    for (long t = 0; t < tasks; ++t, ++draw.task) kernels.draw(draw, 0, elements, y + t * elements);
}

template void draw_tasks<float>(Draw, long, long, float*);
template void draw_tasks<double>(Draw, long, long, double*);

template class Runner<float>;
template class Runner<double>;

}  // namespace maml_fast
