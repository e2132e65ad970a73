// Part of Engine: threads that share a task.

// f(0) … f(n − 1), each by one thread; which one makes no difference to the result. Fewer than `fewest` are not
// worth waking anybody.
template <class F>
void each(long n, F f, long fewest = 2) const {
    if (call_.team <= 1 || n < fewest) {
        for (long i = 0; i < n; ++i) f(i);
        return;
    }
    struct Job {
        F& f;
        long n, next;
    } job{f, n, 0};
    auto work = [](void* context, int) {
        Job& j = *static_cast<Job*>(context);
        for (long i; (i = __atomic_fetch_add(&j.next, 1, __ATOMIC_RELAXED)) < j.n;) j.f(i);
    };
    call_.parallel(call_.team, work, &job);
}

// f(first, last) over n in a few shares, or in one where nobody shares them.
template <class F>
void each_samples(long n, F f) const {
    long shares = call_.team > 1 ? least(n, 4L * call_.team) : least(n, 1L);
    each(shares, [=](long i) { f(i * n / shares, (i + 1) * n / shares); });
}

// A convolution's result in shares: of samples where they have rows enough for full tiles, and of panels.
template <class F>
void each_share(long N, long positions, long columns, F f) const {
    if (call_.team <= 1) return f(Share{0, N, 0, columns});
    constexpr long kRows = 512, kColumns = kWidest * lanes<S>;
    long shares = least(least(N, 4L * call_.team), 1 + N * positions / kRows), panels = ceil_div(columns, kColumns);
    each(shares * panels, [=](long i) {
        long share = i / panels, panel = i % panels;
        f(Share{share * N / shares, (share + 1) * N / shares, panel * kColumns,
                least((panel + 1) * kColumns, columns)});
    });
}

static constexpr long kFewChunks = 4;

// sums (width) = Σ_rows, in chunks of rows; add(first, last, sums) puts those rows' sums.
template <class F>
void sum_chunks(long rows, long width, S* partial, S* sums, F add) const {
    long chunks = ceil_div(rows, kNormChunk);
    each(
        chunks, [=](long i) { add(i * kNormChunk, least((i + 1) * kNormChunk, rows), partial + i * width); },
        kFewChunks);
    copy(partial, sums, width);
    for (long i = 1; i < chunks; ++i) put(false, sums, width, [=](long c) { return partial[i * width + c]; });
}
