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

// sums (arrays × C) = Σ_rows, in chunks; add(first, last, sums) adds those rows to zeroed sums.
template <class S, class Each, class F>
void chunked_sums(long rows, long width, S* partial, S* sums, Each each, F add) {
    long chunks = ceil_div(rows, kNormChunk);
    each(chunks, [=](long i) {
        S* mine = partial + i * width;
        fill(mine, width, S(0));
        add(i * kNormChunk, least((i + 1) * kNormChunk, rows), mine);
    });
    fill(sums, width, S(0));
    for (long i = 0; i < chunks; ++i)
        for (long c = 0; c < width; ++c) sums[c] += partial[i * width + c];
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

// mean (C), inv = 1/σ (C): a chunk's mean and squared deviations while it is in cache, then the chunks' in order.
template <class S, class Each>
void norm_moments(const Norm<S>& n, const S* x, S* mean, S* inv, S* partial, Each each) {
    long C = n.C, rows = n.rows(), chunks = ceil_div(rows, kNormChunk);
    each(chunks, [=](long i) {
        S* __restrict m = partial + 2 * i * C, * __restrict d2 = m + C;
        long first = i * kNormChunk, last = least(first + kNormChunk, rows);
        fill(m, 2 * C, S(0));
        for (long r = first; r < last; ++r)
            for (long c = 0; c < C; ++c) m[c] += x[r * C + c];
        for (long c = 0; c < C; ++c) m[c] /= S(last - first);
        for (long r = first; r < last; ++r)
            for (long c = 0; c < C; ++c) {
                S d = x[r * C + c] - m[c];
                d2[c] += d * d;
            }
    });
    copy(partial, mean, C);
    copy(partial + C, inv, C);
    for (long i = 1; i < chunks; ++i) {
        const S *m = partial + 2 * i * C, *d2 = m + C;
        S before = S(i * kNormChunk), more = S(least(kNormChunk, rows - i * kNormChunk)), total = before + more;
        for (long c = 0; c < C; ++c) {
            S d = m[c] - mean[c];
            mean[c] += d * (more / total);
            inv[c] += d2[c] + d * d * (before * more / total);
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

// The row of x under window position k of result row r.
template <class S>
inline long row_under(const Norm<S>& n, long r, long k) {
    long x = r % n.ow, y = r / n.ow % n.oh, sample = r / (n.ow * n.oh);
    return (sample * n.h + y * n.kh + k / n.kw) * n.w + x * n.kw + k % n.kw;
}

// The result row over a row of x and its place in the window; −1 where the window's floor leaves it out.
template <class S>
inline long row_over(const Norm<S>& n, long r, S& k) {
    long x = r % n.w, y = r / n.w % n.h, sample = r / (n.w * n.h), oy = y / n.kh, ox = x / n.kw;
    k = S(y % n.kh * n.kw + x % n.kw);
    return oy < n.oh && ox < n.ow ? (sample * n.oh + oy) * n.ow + ox : -1;
}

// Results [first, last). Pooled: `where` is the maximum's place in its window, or −1 − place where φ' = slope; `best`
// its x̂.
template <class S>
void norm_values(const Norm<S>& n, const S* arrays, const S* mean, const S* inv, long first, long last, const S* x,
                 S* y, S* where, S* best) {
    long C = n.C;
    const S* __restrict w = arrays + kW * C, * __restrict b = arrays + kB * C, * __restrict mu = mean, * __restrict r = inv;
    S slope = n.slope;
    for (long i = first; i < last; ++i) {
        S* __restrict out = y + i * C;
        if (!n.pooled()) {
            const S* __restrict in = x + i * C;
            for (long c = 0; c < C; ++c) {
                S t = w[c] * ((in[c] - mu[c]) * r[c]) + b[c];
                out[c] = t <= S(0) ? slope * t : t;
            }
            continue;
        }
        S* __restrict at = where + i * C, * __restrict xh = best + i * C;
        for (long k = 0; k < n.kh * n.kw; ++k) {
            const S* __restrict in = x + row_under(n, i, k) * C;
            S place = S(k);
            if (k == 0) {
                for (long c = 0; c < C; ++c) {
                    S h = (in[c] - mu[c]) * r[c];
                    out[c] = w[c] * h + b[c];
                    at[c] = S(0);
                    xh[c] = h;
                }
            } else {
                for (long c = 0; c < C; ++c) {
                    S h = (in[c] - mu[c]) * r[c], t = w[c] * h + b[c];
                    bool more = t > out[c] || t != t;  // a NaN wins, as in PyTorch
                    out[c] = more ? t : out[c];
                    at[c] = more ? place : at[c];
                    xh[c] = more ? h : xh[c];
                }
            }
        }
        for (long c = 0; c < C; ++c) {
            bool below = out[c] <= S(0);
            out[c] = below ? slope * out[c] : out[c];
            at[c] = below ? S(-1) - at[c] : at[c];
        }
    }
}

// What a loop over result rows reads besides its own arrays.
template <class S>
struct NormTape {
    const S *x, *mean, *inv, *where, *best;
};
template <class S>
struct NormTangents {
    const S *tx, *mean, *s, *best;  // tx null: zero
};

// Σ φ' δy and Σ φ' δy x̂ of result rows [first, last).
template <class S>
void norm_sums(const Norm<S>& n, const S* arrays, const NormTape<S>& t, long first, long last, const S* dy, S* sums) {
    long C = n.C;
    const S* __restrict w = arrays + kW * C, * __restrict b = arrays + kB * C;
    S* __restrict d_sum = sums, * __restrict dx_sum = sums + C, slope = n.slope;
    for (long i = first; i < last; ++i) {
        const S* __restrict d = dy + i * C;
        if (n.pooled()) {
            const S* __restrict at = t.where + i * C, * __restrict h = t.best + i * C;
            for (long c = 0; c < C; ++c) {
                S g = at[c] < S(0) ? slope * d[c] : d[c];
                d_sum[c] += g;
                dx_sum[c] += g * h[c];
            }
        } else {
            const S* __restrict x = t.x + i * C, * __restrict mu = t.mean, * __restrict r = t.inv;
            for (long c = 0; c < C; ++c) {
                S h = (x[c] - mu[c]) * r[c], v = w[c] * h + b[c], g = v <= S(0) ? slope * d[c] : d[c];
                d_sum[c] += g;
                dx_sum[c] += g * h;
            }
        }
    }
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

// φ' δy on a row of x that stands at place k of its window; `v` is w x̂ + b.
template <bool Pooled, class S>
inline S spread_back(S at, S k, S v, S d, S slope) {
    if (Pooled) return at == k ? d : at == S(-1) - k ? slope * d : S(0);
    return v <= S(0) ? slope * d : d;
}

template <bool Pooled, class S>
void norm_deltas(const Norm<S>& n, const S* arrays, const NormTape<S>& t, bool put_first, long first, long last,
                 const S* dy, S* dx) {
    long C = n.C;
    const S* __restrict w = arrays + kW * C, * __restrict b = arrays + kB * C, * __restrict q = arrays + kQ * C, * __restrict p = arrays + kP * C, * __restrict mu = t.mean, * __restrict r = t.inv;
    S slope = n.slope;
    for (long i = first; i < last; ++i) {
        S k = S(0);
        long o = Pooled ? row_over(n, i, k) : i;
        const S* __restrict x = t.x + i * C;
        S* __restrict to = dx + i * C;
        auto rest = [=](long c, S g) { return r[c] * (w[c] * g - q[c] - (x[c] - mu[c]) * r[c] * p[c]); };
        if (o < 0) {
            put(put_first, to, C, [=](long c) { return rest(c, S(0)); });
            continue;
        }
        const S* __restrict d = dy + o * C, * __restrict at = Pooled ? t.where + o * C : nullptr;
        put(put_first, to, C, [=](long c) {
            S v = Pooled ? S(0) : w[c] * ((x[c] - mu[c]) * r[c]) + b[c];
            return rest(c, spread_back<Pooled>(Pooled ? at[c] : S(0), k, v, d[c], slope));
        });
    }
}

// Σ ẋ and Σ x̂ ẋ of rows [first, last) of x.
template <class S>
void norm_tangent_moments(const Norm<S>& n, const NormTape<S>& t, const S* tx, long first, long last, S* sums) {
    long C = n.C;
    const S* __restrict mu = t.mean, * __restrict r = t.inv;
    S* __restrict m = sums, * __restrict s = sums + C;
    for (long i = first; i < last; ++i) {
        const S* __restrict x = t.x + i * C, * __restrict v = tx + i * C;
        for (long c = 0; c < C; ++c) {
            m[c] += v[c];
            s[c] += (x[c] - mu[c]) * r[c] * v[c];
        }
    }
}

// ẏ of result rows [first, last); pooled: `best` is x̂˙ at the maximum.
template <class S>
void norm_tangent_values(const Norm<S>& n, const S* arrays, const NormTape<S>& t, const NormTangents<S>& v, long first,
                         long last, S* ty, S* best) {
    long C = n.C;
    const S* __restrict w = arrays + kW * C, * __restrict b = arrays + kB * C, * __restrict vw = arrays + kVw * C, * __restrict vb = arrays + kVb * C, * __restrict mu = t.mean, * __restrict r = t.inv, * __restrict tm = v.mean, * __restrict s = v.s;
    S slope = n.slope;
    for (long i = first; i < last; ++i) {
        S* __restrict out = ty + i * C;
        if (!n.pooled()) {
            const S* __restrict x = t.x + i * C, * __restrict tx = v.tx ? v.tx + i * C : nullptr;
            auto value = [=](long c, S h, S th) {
                S a = w[c] * th + vw[c] * h + vb[c];
                return w[c] * h + b[c] <= S(0) ? slope * a : a;
            };
            if (tx)
                for (long c = 0; c < C; ++c) {
                    S h = (x[c] - mu[c]) * r[c];
                    out[c] = value(c, h, (tx[c] - tm[c] - h * s[c]) * r[c]);
                }
            else
                for (long c = 0; c < C; ++c) out[c] = value(c, (x[c] - mu[c]) * r[c], S(0));
            continue;
        }
        const S* __restrict at = t.where + i * C, * __restrict h = t.best + i * C;
        S* __restrict th = best + i * C;
        fill(th, C, S(0));
        for (long k = 0; v.tx && k < n.kh * n.kw; ++k) {
            const S* __restrict tx = v.tx + row_under(n, i, k) * C;
            S place = S(k);
            for (long c = 0; c < C; ++c) th[c] = at[c] == place || at[c] == S(-1) - place ? tx[c] : th[c];
        }
        for (long c = 0; c < C; ++c) {
            S g = v.tx ? (th[c] - tm[c] - h[c] * s[c]) * r[c] : S(0), a = w[c] * g + vw[c] * h[c] + vb[c];
            th[c] = g;
            out[c] = at[c] < S(0) ? slope * a : a;
        }
    }
}

// Σ φ' δy, Σ φ' δy x̂, Σ φ' δ̇y and Σ φ' (δ̇y x̂ + δy x̂˙) of result rows [first, last).
template <class S>
void norm_tangent_sums(const Norm<S>& n, const S* arrays, const NormTape<S>& t, const NormTangents<S>& v, long first,
                       long last, const S* dy, const S* ey, S* sums) {
    long C = n.C;
    const S* __restrict w = arrays + kW * C, * __restrict b = arrays + kB * C, * __restrict mu = t.mean, * __restrict r = t.inv, * __restrict tm = v.mean, * __restrict s = v.s;
    S* __restrict sd = sums, * __restrict sdx = sums + C, * __restrict se = sums + 2 * C, * __restrict st = sums + 3 * C;
    S slope = n.slope;
    for (long i = first; i < last; ++i) {
        const S* __restrict d = dy + i * C, * __restrict e = ey + i * C;
        auto add = [=](long c, S f, S h, S th) {
            S g = f * d[c], tg = f * e[c];
            sd[c] += g;
            sdx[c] += g * h;
            se[c] += tg;
            st[c] += tg * h + g * th;
        };
        if (n.pooled()) {
            const S* __restrict at = t.where + i * C, * __restrict h = t.best + i * C, * __restrict th = v.best + i * C;
            for (long c = 0; c < C; ++c) add(c, at[c] < S(0) ? slope : S(1), h[c], th[c]);
            continue;
        }
        const S* __restrict x = t.x + i * C, * __restrict tx = v.tx ? v.tx + i * C : nullptr;
        auto factor = [=](long c, S h) { return w[c] * h + b[c] <= S(0) ? slope : S(1); };
        if (tx)
            for (long c = 0; c < C; ++c) {
                S h = (x[c] - mu[c]) * r[c];
                add(c, factor(c, h), h, (tx[c] - tm[c] - h * s[c]) * r[c]);
            }
        else
            for (long c = 0; c < C; ++c) {
                S h = (x[c] - mu[c]) * r[c];
                add(c, factor(c, h), h, S(0));
            }
    }
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
    const S* __restrict w = arrays + kW * C, * __restrict b = arrays + kB * C, * __restrict vw = arrays + kVw * C, * __restrict q = arrays + kQ * C, * __restrict p = arrays + kP * C, * __restrict tq = arrays + kTq * C, * __restrict tp = arrays + kTp * C, * __restrict mu = t.mean, * __restrict r = t.inv, * __restrict tm = v.mean, * __restrict s = v.s;
    S slope = n.slope;
    for (long i = first; i < last; ++i) {
        S k = S(0);
        long o = Pooled ? row_over(n, i, k) : i;
        const S* __restrict x = t.x + i * C, * __restrict tx = v.tx ? v.tx + i * C : nullptr;
        S* __restrict to = ex + i * C;
        auto finish = [=](long c, S h, S th, S g, S tg) {
            S u = w[c] * g - q[c] - h * p[c];
            S tu = w[c] * tg + vw[c] * g - tq[c] - th * p[c] - h * tp[c];
            return r[c] * (tu - u * s[c] * r[c]);
        };
        auto tangent = [=](long c, S h) { return tx ? (tx[c] - tm[c] - h * s[c]) * r[c] : S(0); };
        if (o < 0) {
            put(put_first, to, C, [=](long c) {
                S h = (x[c] - mu[c]) * r[c];
                return finish(c, h, tangent(c, h), S(0), S(0));
            });
            continue;
        }
        const S* __restrict d = dy + o * C, * __restrict e = ey + o * C, * __restrict at = Pooled ? t.where + o * C : nullptr;
        put(put_first, to, C, [=](long c) {
            S h = (x[c] - mu[c]) * r[c], a = Pooled ? at[c] : S(0), y = w[c] * h + b[c];
            return finish(c, h, tangent(c, h), spread_back<Pooled>(a, k, y, d[c], slope),
                          spread_back<Pooled>(a, k, y, e[c], slope));
        });
    }
}
