// Norms over channels (channel_norm.inl): what a norm is, sums over rows, and the moments of a set of rows.

template <class S>
struct Norm {
    long C, groups;  // groups 0: each channel has its own
    long samples;    // of a set
    long h, w, oh, ow, kh, kw;
    bool constant;
    S eps, slope;

    bool pooled() const { return kh * kw > 1; }
    long rows() const { return samples * h * w; }
    long out_rows() const { return samples * oh * ow; }
    long share() const { return groups ? C / groups : 1; }
};

// What a set's loops read, one element per channel each; partial sums follow.
enum NormArray { kW, kB, kVw, kVb, kQ, kP, kTq, kTp, kSumD, kSumDx, kSumE, kSumTx };
static_assert(kSumTx + 1 == kNormArrays, "plan.h sizes the scratch");

// K sums over rows [first, last) in registers, even and odd rows apart; f(row, sums) adds to them.
template <int K, class W, class F>
inline void register_sums(W, long first, long last, typename W::type* sums, F f) {
    typename W::type even[K] = {}, odd[K] = {};
    long r = first;
    for (; r + 2 <= last; r += 2) {
        f(r, even);
        f(r + 1, odd);
    }
    if (r < last) f(r, even);
    for (int k = 0; k < K; ++k) sums[k] = even[k] + odd[k];
}

// Averages every group's channels and gives all of them the result.
template <class S>
void merge_groups(const Norm<S>& n, S* values) {
    long share = n.share();
    if (share == 1) return;
    for (long g = 0; g < n.C; g += share) {
        S sum = S(0);
        for (long c = g; c < g + share; ++c) sum += values[c];
        fill(values + g, share, sum / S(share));
    }
}

// A chunk's mean and squared deviations, (2, C), while it is in cache.
template <class S>
void chunk_moments(const Norm<S>& n, const S* x, long i, S* partial) {
    long C = n.C, first = i * kNormChunk, last = least(first + kNormChunk, n.rows());
    S *m = partial + 2 * i * C, *d2 = m + C;
    each_lane<S>(C, [=](auto w, long c) {
        using V = typename decltype(w)::type;
        V sum, square;
        register_sums<1>(w, first, last, &sum, [=](long r, V* s) { s[0] += get(w, x + r * C + c); });
        V centre = sum / S(last - first);
        register_sums<1>(w, first, last, &square, [=](long r, V* s) {
            V d = get(w, x + r * C + c) - centre;
            s[0] += d * d;
        });
        set(w, m + c, centre);
        set(w, d2 + c, square);
    });
}

// mean (C) and inv = 1/σ (C) from the chunks' moments, in order.
template <class S>
void merge_moments(const Norm<S>& n, S* partial, S* mean, S* inv) {
    long C = n.C, rows = n.rows(), chunks = ceil_div(rows, kNormChunk);
    copy(partial, mean, C);
    copy(partial + C, inv, C);
    for (long i = 1; i < chunks; ++i) {
        const S *m = partial + 2 * i * C, *d2 = m + C;
        S before = S(i * kNormChunk), more = S(least(kNormChunk, rows - i * kNormChunk)), total = before + more;
        S share = more / total, weight = before * share;
        for (long c = 0; c < C; ++c) {
            S d = m[c] - mean[c];
            mean[c] += d * share;
            inv[c] += d2[c] + d * d * weight;
        }
    }
    for (long c = 0; c < C; ++c) inv[c] /= S(rows);
    if (n.groups) {
        S* own = partial;
        copy(mean, own, C);
        merge_groups(n, mean);
        for (long c = 0; c < C; ++c) inv[c] += (own[c] - mean[c]) * (own[c] - mean[c]);
        merge_groups(n, inv);
    }
    for (long c = 0; c < C; ++c) inv[c] = S(1) / sqrt_(inv[c] + n.eps);
}

template <class S>
void running_moments(const Norm<S>& n, const S* means, const S* variances, S* mean, S* inv) {
    for (long c = 0; c < n.C; ++c) {
        mean[c] = means[c];
        inv[c] = S(1) / sqrt_(variances[c] + n.eps);
    }
}

// Missing weights are 1, missing biases and directions 0.
template <class S>
void norm_parameters(long C, const S* w, const S* b, const S* vw, const S* vb, S* arrays) {
    put(true, arrays + kW * C, C, [=](long c) { return w ? w[c] : S(1); });
    put(true, arrays + kB * C, C, [=](long c) { return b ? b[c] : S(0); });
    put(true, arrays + kVw * C, C, [=](long c) { return vw ? vw[c] : S(0); });
    put(true, arrays + kVb * C, C, [=](long c) { return vb ? vb[c] : S(0); });
}
