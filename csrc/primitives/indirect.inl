// C[row] = (C[row] | bias | 0) + Σ_segments A[row + a …] B[b …], where the rows of A and C are anywhere: a product
// that never gathers its operands. Each: one between columns of the same number, A[row + a + j] B[b, j].

// One operand pair of a product: the source rows, and the weights (row-major, `ld` apart).
template <class S>
struct Pair {
    const S* a;
    const S* b;
};

template <class S>
struct Indirect {
    Pair<S> pairs[2];  // the second is absent where pairs[1].a is null
    const Segment* segments;
    int n;
    long ld;
    bool add;
    const S* bias;
};

constexpr int kEachRows = 4;  // of tiles whose columns meet each: more share no more operands

// MR rows by NV vectors of C in registers. Edge: fewer columns than NV vectors hold.
template <class S, bool Each, int MR, int NV, bool Edge>
__attribute__((noinline)) void indirect_tile(const Indirect<S>& p, long column, const long* from, const long* to, S* y,
                                             long columns) {
    constexpr long L = lanes<S>;
    const EdgeOf<S> edge(columns - (NV - 1) * L);  // only the last vector is ragged
    auto read = [&](const S* q, int v) { return Edge && v == NV - 1 ? load_edge(q + v * L, edge) : load(q + v * L); };
    vec<S> acc[MR][NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
        vec<S> start = p.bias ? read(p.bias + column, v) : vec<S>{};
#pragma GCC unroll 32
        for (int r = 0; r < MR; ++r) acc[r][v] = p.add ? read(y + to[r] + column, v) : start;
    }
    for (int half = 0; half < 2 && p.pairs[half].a; ++half) {
        const S *a = p.pairs[half].a, *b0 = p.pairs[half].b + column;
        for (int s = 0; s < p.n; ++s) {
            const Segment& segment = p.segments[s];
            const S *row[MR], *b = b0 + segment.b * p.ld;
#pragma GCC unroll 32
            for (int r = 0; r < MR; ++r) row[r] = a + from[r] + segment.a;
            for (long k = 0; k < segment.depth; ++k, b += p.ld) {
                vec<S> bv[NV];
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v)
                    bv[v] = Edge && kMaskedEdges<S> && v == NV - 1 ? load_edge(b + v * L, edge) : load(b + v * L);
#pragma GCC unroll 32
                for (int r = 0; r < MR; ++r)
                    if constexpr (Each) {
#pragma GCC unroll 4
                        for (int v = 0; v < NV; ++v) acc[r][v] += read(row[r] + column, v) * bv[v];
                    } else {
                        S x = row[r][k];
#pragma GCC unroll 4
                        for (int v = 0; v < NV; ++v) acc[r][v] += x * bv[v];
                    }
            }
        }
    }
#pragma GCC unroll 32
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            S* q = y + to[r] + column + v * L;
            Edge&& v == NV - 1 ? store_edge(q, acc[r][v], edge) : store(q, acc[r][v]);
        }
}

template <class S>
using IndirectTile = void (*)(const Indirect<S>&, long, const long*, const long*, S*, long);

template <class S, bool Each, int NV, bool Edge, int... MR>
inline IndirectTile<S> pick_indirect(int rows, Heights<MR...>) {
    static constexpr IndirectTile<S> table[] = {indirect_tile<S, Each, MR + 1, NV, Edge>...};
    return table[rows - 1];
}

// f(column, columns, top, height) for the tiles that cover `rows` rows, at most kTileRows, of the columns from `first`
// to `last`.
template <class S, bool Each, class F>
inline void each_tile(int rows, long first, long last, F f) {
    for (long j = first, columns; j < last; j += columns) {
        columns = least(last - j, kWidest * lanes<S>);
        int highest = Each ? kEachRows : tile_rows(int(ceil_div(columns, lanes<S>)));
        int tiles = (rows + highest - 1) / highest;
        for (int i = 0; i < tiles; ++i) {
            int top = i * rows / tiles;
            f(j, columns, top, (i + 1) * rows / tiles - top);
        }
    }
}

template <bool Each, int NV>
using TileHeights = HeightsTo<(Each                        ? kEachRows
                               : tile_rows(NV) < kTileRows ? tile_rows(NV)
                                                           : kTileRows)>;

// Columns [first, last) of `rows` rows of C; `first` is a multiple of a panel's width.
template <class S, bool Each>
inline void indirect_rows(const Indirect<S>& p, int rows, const long* from, const long* to, S* y, long first,
                          long last) {
    each_tile<S, Each>(rows, first, last, [&](long j, long columns, int top, int height) {
        auto tile = by_width<S>(columns, [&](auto vectors, auto ragged) {
            return pick_indirect<S, Each, vectors.value, ragged.value>(height, TileHeights<Each, vectors.value>{});
        });
        tile(p, j, from + top, to + top, y, columns);
    });
}

// ---- the transposed product: Σ over the positions of a lattice ------------------------------------

// C[m] (+)= Σ_positions A[position + a_m] B[position …] for m < MR, `ld` between rows of C. Each: as above.
template <class S>
struct Lattice {
    const S *a, *b;
    long samples, a_sample, b_sample;
    long ny, a_y, b_y;
    long nx, a_x, b_x;
};

template <class S, bool Each, int MR, int NV, bool Edge>
__attribute__((noinline)) void lattice_tile(const Lattice<S>& t, const long* offsets, bool add, S* c, long ld,
                                            long columns) {
    constexpr long L = lanes<S>;
    const EdgeOf<S> edge(columns - (NV - 1) * L);
    vec<S> acc[MR][NV];
#pragma GCC unroll 32
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            const S* q = c + r * ld + v * L;
            acc[r][v] = !add ? vec<S>{} : Edge && v == NV - 1 ? load_edge(q, edge) : load(q);
        }
    for (long n = 0; n < t.samples; ++n)
        for (long y = 0; y < t.ny; ++y) {
            const S *a0 = t.a + n * t.a_sample + y * t.a_y, *b = t.b + n * t.b_sample + y * t.b_y;
            const S* row[MR];
#pragma GCC unroll 32
            for (int r = 0; r < MR; ++r) row[r] = a0 + offsets[r];
            for (long x = 0, xa = 0; x < t.nx; ++x, xa += t.a_x, b += t.b_x) {
                vec<S> bv[NV];
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v)
                    bv[v] = Edge && kMaskedEdges<S> && v == NV - 1 ? load_edge(b + v * L, edge) : load(b + v * L);
#pragma GCC unroll 32
                for (int r = 0; r < MR; ++r)
                    if constexpr (Each) {
#pragma GCC unroll 4
                        for (int v = 0; v < NV; ++v) {
                            const S* q = row[r] + xa + v * L;
                            acc[r][v] += (Edge && v == NV - 1 ? load_edge(q, edge) : load(q)) * bv[v];
                        }
                    } else {
                        S s = row[r][xa];
#pragma GCC unroll 4
                        for (int v = 0; v < NV; ++v) acc[r][v] += s * bv[v];
                    }
            }
        }
#pragma GCC unroll 32
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            S* q = c + r * ld + v * L;
            Edge&& v == NV - 1 ? store_edge(q, acc[r][v], edge) : store(q, acc[r][v]);
        }
}

template <class S>
using LatticeTile = void (*)(const Lattice<S>&, const long*, bool, S*, long, long);

template <class S, bool Each, int NV, bool Edge, int... MR>
inline LatticeTile<S> pick_lattice(int rows, Heights<MR...>) {
    static constexpr LatticeTile<S> table[] = {lattice_tile<S, Each, MR + 1, NV, Edge>...};
    return table[rows - 1];
}

template <class S, bool Each>
inline void lattice_rows(Lattice<S> t, int rows, const long* offsets, bool add, S* c, long ld, long columns) {
    const S *a = t.a, *b = t.b;
    each_tile<S, Each>(rows, 0, columns, [&](long j, long width, int top, int height) {
        auto tile = by_width<S>(width, [&](auto vectors, auto ragged) {
            return pick_lattice<S, Each, vectors.value, ragged.value>(height, TileHeights<Each, vectors.value>{});
        });
        t.a = Each ? a + j : a;
        t.b = b + j;
        tile(t, offsets + top, add, c + top * ld + j, ld, width);
    });
}
