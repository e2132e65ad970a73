// The tangents of norms over channels, forwards and backwards (formulas: channel_norm.inl).

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
