// A kernel as wide as the image slides along one dimension only: its columns count as channels, in the order in which
// both images and weights have them anyway.
//
// y[p] = Σ_taps W[tap] x[p·stride + tap] + b, channels last; weights are (tap, channel in, channel out) here, "flipped"
// ones (tap from last to first, channel out, channel in).
//   δx = flipped conv of δy      ∇W[tap] = Σ_p x[p·stride + tap]ᵀ δy[p]      ∇b = Σ_p δy[p]
//   ẏ  = W * ẋ + V * x + v_b      δ̇x = Wᵀ * δ̇y + Vᵀ * δy      ∇W˙ = xᵀ δ̇y + ẋᵀ δy

// (o, c, tap) as PyTorch has them into (tap, c, o), and back.
template <class S>
void conv_weights_inward(long O, long C, long T, const S* from, S* to) {
    for (long o = 0; o < O; ++o)
        for (long c = 0; c < C; ++c)
            for (long t = 0; t < T; ++t) to[(t * C + c) * O + o] = from[(o * C + c) * T + t];
}

template <class S>
void conv_weights_outward(long O, long C, long T, const S* from, S* to) {
    for (long o = 0; o < O; ++o)
        for (long c = 0; c < C; ++c)
            for (long t = 0; t < T; ++t) to[(o * C + c) * T + t] = from[(t * C + c) * O + o];
}

// (o, c, tap, column) as PyTorch has them, flipped: (tap from last to first, o, column, c).
template <class S>
void conv_weights_flipped(long O, long C, long T, long K, const S* from, S* to) {
    for (long o = 0; o < O; ++o)
        for (long c = 0; c < C; ++c)
            for (long t = 0; t < T; ++t)
                for (long k = 0; k < K; ++k, ++from) to[(((T - 1 - t) * O + o) * K + k) * C + c] = *from;
}

// (tap, c, o) flipped: every tap's matrix transposed, in blocks that stay in registers.
template <class S>
void flip_weights(long O, long C, long T, const S* from, S* to) {
    constexpr long L = lanes<S>;
    for (long t = 0; t < T; ++t) {
        const S* in = from + t * C * O;
        S* out = to + (T - 1 - t) * C * O;
        for (long c = 0; c < C; c += L)
            for (long o = 0; o < O; o += L) {
                if (c + L <= C && o + L <= O) {
                    transpose_block(in + c * O + o, O, out + o * C + c, C);
                    continue;
                }
                for (long j = o; j < least(o + L, O); ++j)
                    for (long i = c; i < least(c + L, C); ++i) out[j * C + i] = in[i * O + j];
            }
    }
}

// The part of a product that one thread computes: samples [first, last), columns [begin, end) of a group.
struct Share {
    long first, last, begin, end;
};

// The products of all regions for samples [first, last); `p` lacks the segments. `from_size`, `to_size`: numbers a
// sample. each: depthwise.
template <class S>
void conv_regions(const Region* regions, int n_regions, bool each, Indirect<S> p, const Share& share, long from_size,
                  long to_size, S* y) {
    for (int i = 0; i < n_regions; ++i) {
        const Region& g = regions[i];
        p.segments = g.segments;
        p.n = g.n;
        long total = (share.last - share.first) * g.ny * g.nx, n = share.first, jy = 0, jx = 0;
        long tiles = ceil_div(total, kTileRows), low = tiles ? total / tiles : 0, higher = total - low * tiles;
        for (long t = 0; t < tiles; ++t) {
            int rows = int(low + (t < higher));
            long from[kTileRows], to[kTileRows];
            for (int r = 0; r < rows; ++r) {
                from[r] = n * from_size + g.from + jy * g.from_y + jx * g.from_x;
                to[r] = n * to_size + g.to + jy * g.to_y + jx * g.to_x;
                if (++jx == g.nx) {
                    jx = 0;
                    if (++jy == g.ny) jy = 0, ++n;
                }
            }
            each ? indirect_rows<S, true>(p, rows, from, to, y, share.begin, share.end)
                 : indirect_rows<S, false>(p, rows, from, to, y, share.begin, share.end);
        }
    }
}

// y (+)= W * x [+ V * x'] + bias.
template <class S>
void conv_forward(const Convolution& c, Pair<S> one, Pair<S> two, const S* bias, bool add, const Share& share, S* y) {
    for (long g = 0; g < c.passes(); ++g) {
        long in = g * c.group_channels(), out = g * c.group_outputs();
        auto of_group = [&](Pair<S> p) { return p.a ? Pair<S>{p.a + in, p.b + out} : p; };
        Indirect<S> p{{of_group(one), of_group(two)}, nullptr, 0, c.outputs, add, bias ? bias + out : nullptr};
        conv_regions(c.forward, c.n_forward, c.depthwise(), p, share, c.in_size(), c.out_size(), y + out);
    }
}

// δx (+)= Wᵀ * δy [+ Vᵀ * δy'], with flipped weights.
template <class S>
void conv_backward(const Convolution& c, Pair<S> one, Pair<S> two, bool add, const Share& share, S* dx) {
    for (long g = 0; g < c.passes(); ++g) {
        long in = g * c.group_channels(), out = g * c.group_outputs();
        auto of_group = [&](Pair<S> p) { return p.a ? Pair<S>{p.a + out, p.b + out * c.group_channels()} : p; };
        Indirect<S> p{{of_group(one), of_group(two)}, nullptr, 0, c.group_channels(), add, nullptr};
        conv_regions(c.backward, c.n_backward, c.depthwise(), p, share, c.out_size(), c.in_size(), dx + in);
    }
}

constexpr long kLatticeRows = 256;  // positions whose inputs and deltas stay in cache while all taps pass over them

// Which rows of the weight gradient one tile computes: channels of one tap, or of any where all taps meet one lattice.
inline long gradient_tiles(const Convolution& c) {
    long rows = c.one_lattice ? c.kernel() * c.group_channels() : c.group_channels();
    return c.passes() * ceil_div(rows, kTileRows) * (c.one_lattice ? 1 : c.kernel());
}

// Tile `index` of ∇W (+)= xᵀ δy over samples [first, last) and result rows [top, bottom).
template <class S>
void conv_gradient_tile(const Convolution& c, long index, long first, long last, long top, long bottom, const S* x,
                        const S* dy, bool add, S* dw) {
    long C = c.group_channels(), K = c.one_lattice ? c.kernel() * C : C, tiles = ceil_div(K, kTileRows);
    long tile = index % tiles, tap = c.one_lattice ? 0 : index / tiles % c.kernel(),
         g = index / tiles / (c.one_lattice ? 1 : c.kernel());
    const Region& at = c.taps[tap];
    long low = K / tiles, higher = K - low * tiles;
    long start = tile * low + least(tile, higher);
    int rows = int(low + (tile < higher));
    long offsets[kTileRows];
    for (int r = 0; r < rows; ++r) {
        long k = start + r;
        offsets[r] = c.one_lattice ? c.taps[k / C].from - at.from + k % C : k;
    }
    // the lattice's rows inside [top, bottom)
    long y0 = at.to / at.to_y, begin = top > y0 ? top - y0 : 0, end = least(bottom - y0, at.ny);
    Lattice<S> t{x + first * c.in_size() + at.from + begin * at.from_y + g * C,
                 dy + first * c.out_size() + at.to + begin * at.to_y + g * c.group_outputs(),
                 last - first,
                 c.in_size(),
                 c.out_size(),
                 end > begin ? end - begin : 0,
                 at.from_y,
                 at.to_y,
                 at.nx,
                 at.from_x,
                 at.to_x};
    S* to = dw + (tap * C + start) * c.outputs + g * c.group_outputs();
    c.depthwise() ? lattice_rows<S, true>(t, rows, offsets, add, to, c.outputs, c.outputs)
                  : lattice_rows<S, false>(t, rows, offsets, add, to, c.outputs, c.group_outputs());
}

// Calls f(first, last, top, bottom) for tiles of samples [begin, end) with about `rows` positions each.
template <class F>
void each_position_tile(const Convolution& c, long begin, long end, long rows, F f) {
    long positions = c.window.oh * c.window.ow;
    if (positions <= rows) {
        long step = rows / positions;
        for (long n = begin; n < end; n += step) f(n, least(n + step, end), 0, c.window.oh);
        return;
    }
    long lines = rows / c.window.ow + 1;
    for (long n = begin; n < end; ++n)
        for (long y = 0; y < c.window.oh; y += lines) f(n, n + 1, y, least(y + lines, c.window.oh));
}
