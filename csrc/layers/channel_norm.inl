// Batch, group, instance and running norms of channels-last rows, with the piecewise-linear activation and the max-pool
// that follow them (slope 1 and windows of 1 where there is none):
//   y = max over a window of φ(w x̂ + b),  x̂ = (x − μ)/σ,  σ² = var + eps,  φ(t) = t or slope·t below 0
// With δ = w φ' δy at a window's maximum and 0 elsewhere, and m numbers that share μ and σ:
//   u  = δ − q − x̂ p,   q = mean(δ), p = mean(δ x̂),                    δx = u/σ
//   x̂˙ = (ẋ − mean(ẋ) − x̂ s)/σ,  s = mean(x̂ ẋ) = σ˙,                  ẏ = φ' (w x̂˙ + ẇ x̂ + ḃ) at the maximum
//   u˙ = δ˙ − mean(δ˙) − x̂˙ p − x̂ mean(δ˙ x̂ + δ x̂˙),  δ˙ = φ'(w δ̇y + ẇ δy),  δ̇x = (u˙ − u s/σ)/σ
// A set of rows shares its statistics: all of a task's rows, or one sample's, whose channels are merged by group.
// Running statistics are constants: q, p, s and their tangents vanish.

template <class S>
struct Norm {
    long C, groups;  // groups 0: channels stand for themselves
    long samples;    // of a set
    long h, w, oh, ow, kh, kw;
    bool constant;
    S eps, slope;

    bool pooled() const { return kh * kw > 1; }
    long rows() const { return samples * h * w; }
    long out_rows() const { return samples * oh * ow; }
    long share() const { return groups ? C / groups : 1; }
};

// What a set's loops read, one number a channel each; behind them stand partial sums.
enum NormArray { kW, kB, kVw, kVb, kQ, kP, kTq, kTp, kSumD, kSumDx, kSumE, kSumTx };
static_assert(kSumTx + 1 == kNormArrays, "plan.h sizes the scratch");

// sums (arrays × C) = Σ_rows, in chunks; add(first, last, sums) puts those rows' sums.
template <class S, class Each, class F>
void chunked_sums(long rows, long width, S* partial, S* sums, Each each, F add) {
    long chunks = ceil_div(rows, kNormChunk);
    each(chunks, [=](long i) { add(i * kNormChunk, least((i + 1) * kNormChunk, rows), partial + i * width); });
    copy(partial, sums, width);
    for (long i = 1; i < chunks; ++i) put(false, sums, width, [=](long c) { return partial[i * width + c]; });
}

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

// Rows [first, last) in blocks, and f(w, c, begin, end) for rows and channels of each. Without a pool a channel vector
// goes over all rows of the block, its statistics and weights in registers; with one it goes over one row at a time,
// because windows are read from all over the image and only whole rows are met in the order of memory. block(begin,
// end) prepares what all channels share.
constexpr long kNormBlock = 64;
template <class S, bool Pooled, class Block, class F>
inline void each_block(long first, long last, long C, Block block, F f) {
    for (long r = first; r < last; r += kNormBlock) {
        long end = least(r + kNormBlock, last), step = Pooled ? 1 : end - r;
        block(r, end);
        for (long row = r; row < end; row += step) each_lane<S>(C, [=](auto w, long c) { f(w, c, row, row + step); });
    }
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

// Under every result row of a block: the row of x at its window's corner.
template <class S>
struct Under {
    long begin = 0, row[kNormBlock];

    long of(long r) const { return row[r - begin]; }
    void find(const Norm<S>& n, long first, long last) {
        begin = first;
        long x = first % n.ow, y = first / n.ow % n.oh, sample = first / n.ow / n.oh;
        for (long i = first; i < last; ++i) {
            row[i - first] = (sample * n.h + y * n.kh) * n.w + x * n.kw;
            if (++x < n.ow) continue;
            x = 0;
            if (++y == n.oh) y = 0, ++sample;
        }
    }
};

// Over every row of x of a block: the result row, or −1 where the window's floor leaves it out, and its place there.
template <class S>
struct Over {
    long begin = 0, row[kNormBlock];
    S place[kNormBlock];

    long of(long r) const { return row[r - begin]; }
    S place_of(long r) const { return place[r - begin]; }
    void find(const Norm<S>& n, long first, long last) {
        begin = first;
        long x = first % n.w, y = first / n.w % n.h, sample = first / n.w / n.h;
        long ox = x / n.kw, kx = x % n.kw, oy = y / n.kh, ky = y % n.kh;
        for (long i = first; i < last; ++i) {
            place[i - first] = S(ky * n.kw + kx);
            row[i - first] = oy < n.oh && ox < n.ow ? (sample * n.oh + oy) * n.ow + ox : -1;
            if (++kx == n.kw) kx = 0, ++ox;
            if (++x < n.w) continue;
            x = ox = kx = 0;
            if (++ky == n.kh) ky = 0, ++oy;
            if (++y == n.h) y = oy = ky = 0, ++sample;
        }
    }
};

// Calls f(offset, place) for the window's positions after its corner: rows of x from there, and the position's number.
template <class S, class F>
inline void each_place(const Norm<S>& n, F f) {
    S place = S(0);
    for (long ky = 0; ky < n.kh; ++ky)
        for (long kx = 0; kx < n.kw; ++kx, place += S(1))
            if (ky + kx > 0) f(ky * n.w + kx, place);
}

// What the loops read of the forward pass, and of the tangents (tx null: zero). Pooled: `where` is the maximum's place
// in its window, or −1 − place where φ' = slope; `best` its x̂, or x̂˙.
template <class S>
struct NormTape {
    const S *x, *mean, *inv, *where, *best;
};
template <class S>
struct NormTangents {
    const S *tx, *mean, *s, *best;
};

// One channel vector's constants.
template <class W>
struct NormLane {
    using S = typename W::scalar;
    using V = typename W::type;
    W w;
    V weight, bias, mean, inv, zero;
    S slope;

    NormLane(W w_, const Norm<S>& n, const S* arrays, const NormTape<S>& t, long c)
        : w(w_),
          weight(get(w_, arrays + kW * n.C + c)),
          bias(get(w_, arrays + kB * n.C + c)),
          mean(get(w_, t.mean + c)),
          inv(get(w_, t.inv + c)),
          zero(splat(w_, S(0))),
          slope(n.slope) {}

    V hat(const S* x) const { return (get(w, x) - mean) * inv; }
    V below(V hat_value, V negative, V otherwise) const {
        return weight * hat_value + bias <= zero ? negative : otherwise;
    }
};

// Results [first, last).
template <class S>
void norm_values(const Norm<S>& n, const S* arrays, const NormTape<S>& t, long first, long last, S* y, S* where,
                 S* best) {
    long C = n.C;
    if (!n.pooled()) {
        each_block<S, false>(
            first, last, C, [](long, long) {},
            [&](auto w, long c, long r0, long r1) {
                NormLane k(w, n, arrays, t, c);
                for (long r = r0; r < r1; ++r) {
                    auto v = k.weight * k.hat(t.x + r * C + c) + k.bias;
                    set(w, y + r * C + c, v <= k.zero ? n.slope * v : v);
                }
            });
        return;
    }
    Under<S> under;
    each_block<S, true>(
        first, last, C, [&](long r0, long r1) { under.find(n, r0, r1); },
        [&](auto w, long c, long r0, long r1) {
            NormLane k(w, n, arrays, t, c);
            for (long r = r0; r < r1; ++r) {
                const S* x = t.x + under.of(r) * C + c;
                auto top_hat = k.hat(x), top = k.weight * top_hat + k.bias, place = k.zero;
                each_place(n, [&](long offset, S j) {
                    auto h = k.hat(x + offset * C), v = k.weight * h + k.bias;
                    auto more = (v > top) | (v != v);  // a NaN wins, as in PyTorch
                    top = more ? v : top;
                    top_hat = more ? h : top_hat;
                    place = more ? splat(w, j) : place;
                });
                auto low = top <= k.zero;
                set(w, y + r * C + c, low ? n.slope * top : top);
                set(w, where + r * C + c, low ? S(-1) - place : place);
                set(w, best + r * C + c, top_hat);
            }
        });
}

// Σ φ' δy and Σ φ' δy x̂ of result rows [first, last).
template <class S>
void norm_sums(const Norm<S>& n, const S* arrays, const NormTape<S>& t, long first, long last, const S* dy, S* sums) {
    long C = n.C;
    each_lane<S>(C, [&](auto w, long c) {
        using V = typename decltype(w)::type;
        NormLane k(w, n, arrays, t, c);
        V total[2];
        if (n.pooled())
            register_sums<2>(w, first, last, total, [&](long r, V* s) {
                V d = get(w, dy + r * C + c), g = get(w, t.where + r * C + c) < k.zero ? n.slope * d : d;
                s[0] += g;
                s[1] += g * get(w, t.best + r * C + c);
            });
        else
            register_sums<2>(w, first, last, total, [&](long r, V* s) {
                V h = k.hat(t.x + r * C + c), d = get(w, dy + r * C + c), g = k.below(h, n.slope * d, d);
                s[0] += g;
                s[1] += g * h;
            });
        set(w, sums + c, total[0]);
        set(w, sums + C + c, total[1]);
    });
}

// q and p from the sums of a set.
template <class S>
void norm_means(const Norm<S>& n, S* arrays) {
    long C = n.C;
    S m = n.constant ? S(0) : S(1) / S(n.rows());
    const S *w = arrays + kW * C, *d = arrays + kSumD * C, *dx = arrays + kSumDx * C;
    put(true, arrays + kQ * C, C, [=](long c) { return m * w[c] * d[c]; });
    put(true, arrays + kP * C, C, [=](long c) { return m * w[c] * dx[c]; });
    merge_groups(n, arrays + kQ * C);
    merge_groups(n, arrays + kP * C);
}

// φ' δy over a row of x at `place` of its window, of which `at` is the maximum.
template <class V, class S>
inline V from_maximum(V at, S place, V d, S slope, V zero) {
    return at == place ? d : at == S(-1) - place ? slope * d : zero;
}

template <bool Pooled, class S>
void norm_deltas(const Norm<S>& n, const S* arrays, const NormTape<S>& t, bool put_first, long first, long last,
                 const S* dy, S* dx) {
    long C = n.C;
    Over<S> over;
    auto block = [&](long r0, long r1) {
        if (Pooled) over.find(n, r0, r1);
    };
    each_block<S, Pooled>(first, last, C, block, [&](auto w, long c, long r0, long r1) {
        using V = typename decltype(w)::type;
        NormLane k(w, n, arrays, t, c);
        V q = get(w, arrays + kQ * C + c), p = get(w, arrays + kP * C + c);
        for (long r = r0; r < r1; ++r) {
            V h = k.hat(t.x + r * C + c), g = k.zero;
            long o = Pooled ? over.of(r) : r;
            if (o >= 0) {
                V d = get(w, dy + o * C + c);
                g = Pooled ? from_maximum(get(w, t.where + o * C + c), over.place_of(r), d, n.slope, k.zero)
                           : k.below(h, n.slope * d, d);
            }
            V out = k.inv * (k.weight * g - q - h * p);
            S* to = dx + r * C + c;
            set(w, to, put_first ? out : get(w, to) + out);
        }
    });
}

// Σ ẋ and Σ x̂ ẋ of rows [first, last) of x.
template <class S>
void norm_tangent_moments(const Norm<S>& n, const S* arrays, const NormTape<S>& t, const S* tx, long first, long last,
                          S* sums) {
    long C = n.C;
    each_lane<S>(C, [&](auto w, long c) {
        using V = typename decltype(w)::type;
        NormLane k(w, n, arrays, t, c);
        V total[2];
        register_sums<2>(w, first, last, total, [&](long r, V* s) {
            V v = get(w, tx + r * C + c);
            s[0] += v;
            s[1] += k.hat(t.x + r * C + c) * v;
        });
        set(w, sums + c, total[0]);
        set(w, sums + C + c, total[1]);
    });
}

// A channel vector's constants of the tangents.
template <class W>
struct TangentLane {
    using S = typename W::scalar;
    using V = typename W::type;
    NormLane<W> k;
    V vw, vb, mean, s;
    const S* tx;

    TangentLane(W w, const Norm<S>& n, const S* arrays, const NormTape<S>& t, const NormTangents<S>& v, long c)
        : k(w, n, arrays, t, c),
          vw(get(w, arrays + kVw * n.C + c)),
          vb(get(w, arrays + kVb * n.C + c)),
          mean(get(w, v.mean + c)),
          s(get(w, v.s + c)),
          tx(v.tx ? v.tx + c : nullptr) {}

    V from(V value, V hat) const { return (value - mean - hat * s) * k.inv; }
    V hat_tangent(long offset, V hat) const { return tx ? from(get(k.w, tx + offset), hat) : k.zero; }
    V value(V hat, V tangent) const { return k.weight * tangent + vw * hat + vb; }
};

// ẏ of result rows [first, last); pooled: `best` is x̂˙ at the maximum.
template <class S>
void norm_tangent_values(const Norm<S>& n, const S* arrays, const NormTape<S>& t, const NormTangents<S>& v, long first,
                         long last, S* ty, S* best) {
    long C = n.C;
    if (!n.pooled()) {
        each_block<S, false>(
            first, last, C, [](long, long) {},
            [&](auto w, long c, long r0, long r1) {
                TangentLane l(w, n, arrays, t, v, c);
                for (long r = r0; r < r1; ++r) {
                    auto h = l.k.hat(t.x + r * C + c), a = l.value(h, l.hat_tangent(r * C, h));
                    set(w, ty + r * C + c, l.k.below(h, n.slope * a, a));
                }
            });
        return;
    }
    Under<S> under;
    each_block<S, true>(
        first, last, C, [&](long r0, long r1) { under.find(n, r0, r1); },
        [&](auto w, long c, long r0, long r1) {
            TangentLane l(w, n, arrays, t, v, c);
            for (long r = r0; r < r1; ++r) {
                auto at = get(w, t.where + r * C + c), h = get(w, t.best + r * C + c), th = l.k.zero;
                auto low = at < l.k.zero;
                if (l.tx) {
                    auto place = low ? S(-1) - at : at;
                    const S* tx = l.tx + under.of(r) * C;
                    th = get(w, tx);
                    each_place(n, [&](long offset, S j) { th = place == j ? get(w, tx + offset * C) : th; });
                    th = l.from(th, h);
                }
                auto a = l.value(h, th);
                set(w, best + r * C + c, th);
                set(w, ty + r * C + c, low ? n.slope * a : a);
            }
        });
}

// Σ φ' δy, Σ φ' δy x̂, Σ φ' δ̇y and Σ φ' (δ̇y x̂ + δy x̂˙) of result rows [first, last).
template <class S>
void norm_tangent_sums(const Norm<S>& n, const S* arrays, const NormTape<S>& t, const NormTangents<S>& v, long first,
                       long last, const S* dy, const S* ey, S* sums) {
    long C = n.C;
    each_lane<S>(C, [&](auto w, long c) {
        using V = typename decltype(w)::type;
        TangentLane l(w, n, arrays, t, v, c);
        V total[4];
        register_sums<4>(w, first, last, total, [&](long r, V* s) {
            V d = get(w, dy + r * C + c), e = get(w, ey + r * C + c), h, th, g, tg;
            if (n.pooled()) {
                auto low = get(w, t.where + r * C + c) < l.k.zero;
                h = get(w, t.best + r * C + c);
                th = get(w, v.best + r * C + c);
                g = low ? n.slope * d : d;
                tg = low ? n.slope * e : e;
            } else {
                h = l.k.hat(t.x + r * C + c);
                th = l.hat_tangent(r * C, h);
                g = l.k.below(h, n.slope * d, d);
                tg = l.k.below(h, n.slope * e, e);
            }
            s[0] += g;
            s[1] += g * h;
            s[2] += tg;
            s[3] += tg * h + g * th;
        });
        for (int j = 0; j < 4; ++j) set(w, sums + j * C + c, total[j]);
    });
}

// The tangents of q and p.
template <class S>
void norm_tangent_means(const Norm<S>& n, S* arrays) {
    long C = n.C;
    S m = n.constant ? S(0) : S(1) / S(n.rows());
    const S *w = arrays + kW * C, *vw = arrays + kVw * C, *d = arrays + kSumD * C, *dx = arrays + kSumDx * C,
            *e = arrays + kSumE * C, *tx = arrays + kSumTx * C;
    put(true, arrays + kTq * C, C, [=](long c) { return m * (w[c] * e[c] + vw[c] * d[c]); });
    put(true, arrays + kTp * C, C, [=](long c) { return m * (w[c] * tx[c] + vw[c] * dx[c]); });
    merge_groups(n, arrays + kTq * C);
    merge_groups(n, arrays + kTp * C);
}

template <bool Pooled, class S>
void norm_tangent_deltas(const Norm<S>& n, const S* arrays, const NormTape<S>& t, const NormTangents<S>& v,
                         bool put_first, long first, long last, const S* dy, const S* ey, S* ex) {
    long C = n.C;
    Over<S> over;
    auto block = [&](long r0, long r1) {
        if (Pooled) over.find(n, r0, r1);
    };
    each_block<S, Pooled>(first, last, C, block, [&](auto w, long c, long r0, long r1) {
        using V = typename decltype(w)::type;
        TangentLane l(w, n, arrays, t, v, c);
        V q = get(w, arrays + kQ * C + c), p = get(w, arrays + kP * C + c), tq = get(w, arrays + kTq * C + c),
          tp = get(w, arrays + kTp * C + c);
        for (long r = r0; r < r1; ++r) {
            V h = l.k.hat(t.x + r * C + c), th = l.hat_tangent(r * C, h), g = l.k.zero, tg = l.k.zero;
            long o = Pooled ? over.of(r) : r;
            if (o >= 0) {
                V d = get(w, dy + o * C + c), e = get(w, ey + o * C + c);
                if (Pooled) {
                    V at = get(w, t.where + o * C + c);
                    g = from_maximum(at, over.place_of(r), d, n.slope, l.k.zero);
                    tg = from_maximum(at, over.place_of(r), e, n.slope, l.k.zero);
                } else {
                    g = l.k.below(h, n.slope * d, d);
                    tg = l.k.below(h, n.slope * e, e);
                }
            }
            V u = l.k.weight * g - q - h * p;
            V tu = l.k.weight * tg + l.vw * g - tq - th * p - h * tp;
            V out = l.k.inv * (tu - u * l.s * l.k.inv);
            S* to = ex + r * C + c;
            set(w, to, put_first ? out : get(w, to) + out);
        }
    });
}
