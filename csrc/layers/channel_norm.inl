// Batch, group, instance and running norms of channels-last rows, with the piecewise-linear activation and the max-pool
// that follow them (slope 1 and windows of 1 where there is none):
//   y = max over a window of φ(w x̂ + b),  x̂ = (x − μ)/σ,  σ² = var + eps,  φ(t) = t or slope·t below 0
// With δ = w φ' δy at a window's maximum and 0 elsewhere, and m numbers that share μ and σ:
//   u  = δ − q − x̂ p,   q = mean(δ), p = mean(δ x̂),                    δx = u/σ
//   x̂˙ = (ẋ − mean(ẋ) − x̂ s)/σ,  s = mean(x̂ ẋ) = σ˙,                  ẏ = φ' (w x̂˙ + ẇ x̂ + ḃ) at the maximum
//   u˙ = δ˙ − mean(δ˙) − x̂˙ p − x̂ mean(δ˙ x̂ + δ x̂˙),  δ˙ = φ'(w δ̇y + ẇ δy),  δ̇x = (u˙ − u s/σ)/σ
// A set of rows shares its statistics: all of a task's rows, or one sample's, whose channels are merged by group.
// Running statistics are constants: q, p, s and their tangents vanish.

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
