// C = (source | bias | 0) + scale (A B + A' B'), with B in packed panels or in place.

// A: element (m, k) at p[m·rs + k·cs].
template <class S>
struct Left {
    const S* p;
    long rs, cs;
};

// B: element (k, n). In place: p[k·ld + n]. Packed: panels of `panel_width` columns, each k-major and `ld`
// rows deep.
template <class S>
struct Right {
    const S* p;
    long ld;
    bool packed;
    bool padded;  // reading a vector past the end of a row is allowed
};

// One of at most two products that are added up, from row `from` of B on; absent where depth is 0.
template <class S>
struct Product {
    long depth;
    Left<S> a;
    Right<S> b;
    long from = 0;
};

// Where C goes and what is added to the products: source (laid out like p, may be p itself), a bias per
// column, or zero where both are null; at most one is given. A scale other than 1 needs a source.
template <class S>
struct Result {
    S* p;
    long ld;
    const S* source;
    const S* bias;
    S scale = S(1);

    Result at(long row, long column) const {
        return {p + row * ld + column, ld, source ? source + row * ld + column : nullptr,
                bias ? bias + column : nullptr, scale};
    }
    // The same place, to which more is added.
    Result again() const { return {p, ld, p, nullptr, scale}; }
};

// What one panel of C is made from.
template <class S>
struct Strip {
    long depth;
    const S* a;
    long rs, cs;
    const S* b;
    long ldb;
};

// Tile heights that keep the accumulators in registers and the multipliers busy.
constexpr int tile_rows(int vectors) {
    return vectors == 2 || MAML_FAST_ROWS > 6 ? MAML_FAST_ROWS : 2 * MAML_FAST_ROWS;
}

// MR rows by NV vectors of C in registers, from row `top` of the strips on. Edge: fewer columns than NV vectors hold.
template <class S, int MR, int NV, bool Edge>
__attribute__((noinline)) void tile(const Strip<S>* strips, long top, const Result<S>& c, long columns) {
    constexpr long L = lanes<S>;
    const EdgeOf<S> edge(columns - (NV - 1) * L);  // only the last vector is ragged
    auto read = [&](const S* p, int v) { return Edge && v == NV - 1 ? load_edge(p + v * L, edge) : load(p + v * L); };
    vec<S> acc[MR][NV];
    const bool scaled = c.scale != S(1);
    if (c.source && !scaled) {
#pragma GCC unroll 32
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < NV; ++v) acc[r][v] = read(c.source + r * c.ld, v);
    } else {
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) {
            vec<S> start = c.bias ? read(c.bias, v) : vec<S>{};
#pragma GCC unroll 32
            for (int r = 0; r < MR; ++r) acc[r][v] = start;
        }
    }
    for (int t = 0; t < kProducts && strips[t].depth > 0; ++t) {
        const auto [depth, start, rs, cs, from, ldb] = strips[t];
        // one pointer for three rows: a and two offsets that addresses can hold
        constexpr int kPointers = (MR + 2) / 3;
        const S *a[kPointers], *b = from;
#pragma GCC unroll 32
        for (int i = 0; i < kPointers; ++i) a[i] = start + (top + 3 * i) * rs;
        for (long k = depth; k > 0; --k, b += ldb) {
            vec<S> bv[NV];
#pragma GCC unroll 2
            for (int v = 0; v < NV; ++v)
                bv[v] = Edge && kMaskedEdges<S> && v == NV - 1 ? load_edge(b + v * L, edge) : load(b + v * L);
#pragma GCC unroll 32
            for (int r = 0; r < MR; ++r) {
                S x = a[r / 3][r % 3 * rs];
#pragma GCC unroll 2
                for (int v = 0; v < NV; ++v) acc[r][v] += x * bv[v];
            }
#pragma GCC unroll 32
            for (int i = 0; i < kPointers; ++i) a[i] += cs;
        }
    }
#pragma GCC unroll 32
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) {
            if (scaled) acc[r][v] = read(c.source + r * c.ld, v) + c.scale * acc[r][v];
            if (Edge && v == NV - 1)
                store_edge(c.p + r * c.ld + v * L, acc[r][v], edge);
            else
                store(c.p + r * c.ld + v * L, acc[r][v]);
        }
}

template <class S>
using Tile = void (*)(const Strip<S>*, long, const Result<S>&, long);

// Tiles by height: tiles<S, NV, Edge>[rows - 1].
template <class S, int NV, bool Edge, int... MR>
inline Tile<S> pick(unsigned rows, Heights<MR...>) {
    static constexpr Tile<S> table[] = {tile<S, MR + 1, NV, Edge>...};
    return table[rows - 1];
}

// All rows of C for the columns of one panel, in tiles of nearly equal height.
template <class S, int NV, bool Edge>
inline void panel(long M, const Strip<S>* strips, const Result<S>& c, long columns) {
    constexpr HeightsTo<tile_rows(NV)> heights;
    if (M <= tile_rows(NV)) return pick<S, NV, Edge>(unsigned(M), heights)(strips, 0, c, columns);
    unsigned tiles = (unsigned(M) + tile_rows(NV) - 1) / tile_rows(NV);
    unsigned low = unsigned(M) / tiles, higher = unsigned(M) - low * tiles;
    for (unsigned i = 0, done = 0; i < tiles; ++i) {
        unsigned rows = low + (i < higher);
        pick<S, NV, Edge>(rows, heights)(strips, done, c.at(done, 0), columns);
        done += rows;
    }
}

// ---- one column: sums along vectors -------------------------------------------------------------

template <class S>
inline bool along_vectors(const Product<S>& t) {
    return t.depth == 0 || (t.a.cs == 1 && !t.b.packed && t.b.ld == 1);
}

template <class S>
inline void add_dots(long top, long rows, const Product<S>& t, vec<S>* acc) {
    constexpr long L = lanes<S>;
    for (long k = 0; k < t.depth; k += L) {
        const EdgeOf<S> edge(t.depth - k);
        const S* a = t.a.p + top * t.a.rs + k;
        vec<S> b = load_edge(t.b.p + k, edge);
#pragma GCC unroll 32
        for (long r = 0; r < L; ++r)
            if (r < rows) acc[r] += load_edge(a + r * t.a.rs, edge) * b;
    }
}

template <class S>
__attribute__((noinline)) void dots(long M, const Product<S>& p, const Product<S>& q, const Result<S>& c) {
    constexpr long L = lanes<S>;
    for (long top = 0; top < M; top += L) {
        const long rows = least(L, M - top);
        vec<S> acc[L] = {};
        add_dots(top, rows, p, acc);
        add_dots(top, rows, q, acc);
        const EdgeOf<S> edge(rows);
        vec<S> sums = sum_each<S>(acc) * c.scale;
        if (c.source) sums += load_edge(c.source + top, edge);
        if (c.bias) sums += *c.bias;
        store_edge(c.p + top, sums, edge);
    }
}

// Row-major B (K × N) into panels.
template <class S>
inline void pack(long K, long N, const S* b, long ld, S* out) {
    for (long j = 0; j < N;) {
        long width = panel_width(N, j, lanes<S>), columns = least(width, N - j);
        for (long k = 0; k < K; ++k, out += width) {
            const S* row = b + k * ld + j;
            if (columns == width) {
                for (long v = 0; v < width; v += lanes<S>) store(out + v, load(row + v));
            } else {
                for (long n = 0; n < columns; ++n) out[n] = row[n];
                for (long n = columns; n < width; ++n) out[n] = S(0);
            }
        }
        j += width;
    }
}

// The transpose of row-major W (N × K) into panels of a K × N matrix, block by block in registers.
template <class S>
__attribute__((noinline)) void pack_transposed(long K, long N, const S* w, S* out) {
    constexpr long L = lanes<S>;
    for (long j = 0; j < N;) {
        long width = panel_width(N, j, L);
        for (long v = 0; v < width; v += L) {
            long rows = least(L, N - j - v);
            for (long k = 0; k < K; k += L) {
                const S* from = w + (j + v) * K + k;
                S* to = out + k * width + v;
                if (rows == L && k + L <= K)
                    transpose_block(from, K, to, width);
                else
                    transpose_block(rows, least(L, K - k), from, K, to, width);
            }
        }
        out += K * width;
        j += width;
    }
}

constexpr long kBlockRows = 120, kBlockDepth = 256;  // A's block stays in L2, B's panel in L1
constexpr long kPackFrom = 48;                       // rows of A from which packing B pays

// Columns [j, j + columns) of a term's B as rows of `width`.
template <class S>
inline Strip<S> strip(const Product<S>& term, long j, long columns, long width, S* scratch) {
    const auto& [K, a, b, from] = term;
    if (K == 0) return {};
    if (b.packed) return {K, a.p, a.rs, a.cs, b.p + j * b.ld + from * width, width};
    const S* bj = b.p + from * b.ld + j;
    if (kMaskedEdges<S> || b.padded || columns == width) return {K, a.p, a.rs, a.cs, bj, b.ld};
    pack(K, columns, bj, b.ld, scratch);
    return {K, a.p, a.rs, a.cs, scratch, width};
}

// All panels of C from terms of at most kBlockDepth.
template <class S>
inline void panels(long M, long N, const Product<S>& p, const Product<S>& q, const Result<S>& c, S* scratch) {
    constexpr long L = lanes<S>;
    for (long j = 0; j < N;) {
        long width = panel_width(N, j, L), columns = least(width, N - j);
        const Strip<S> strips[kProducts] = {strip(p, j, columns, width, scratch),
                                            strip(q, j, columns, width, scratch + kBlockDepth * width)};
        if (columns == width)
            width == L ? panel<S, 1, false>(M, strips, c.at(0, j), columns)
                       : panel<S, 2, false>(M, strips, c.at(0, j), columns);
        else
            width == L ? panel<S, 1, true>(M, strips, c.at(0, j), columns)
                       : panel<S, 2, true>(M, strips, c.at(0, j), columns);
        j += width;
    }
}

// One term, cut into blocks of rows and depth.
template <class S>
inline void blocks(long M, long N, const Product<S>& term, Result<S> c, S* scratch) {
    const auto& [K, a, b, from] = term;
    for (long k0 = 0, left = ceil_div(K, kBlockDepth); left > 0; --left) {
        long depth = (K - k0) / left;
        Product<S> block{depth, {a.p + k0 * a.cs, a.rs, a.cs}, b, k0};
        if (!b.packed && M >= kPackFrom) {
            pack(depth, N, b.p + k0 * b.ld, b.ld, scratch);
            block.b = {scratch, depth, true, true};
            block.from = 0;
        }
        for (long m = 0; m < M; m += kBlockRows, block.a.p += kBlockRows * a.rs)
            panels(least(kBlockRows, M - m), N, block, Product<S>{}, c.at(m, 0), scratch);
        c = c.again();
        k0 += depth;
    }
}

// Scratch: `packed_size` of B at a depth of kBlockDepth, and of as many panels as there are terms.
template <class S>
__attribute__((noinline)) void gemm(long M, long N, const Product<S>& p, const Product<S>& q, const Result<S>& c,
                                    S* scratch) {
    if (N == 1 && c.ld == 1 && along_vectors(p) && along_vectors(q)) return dots(M, p, q, c);
    if (M < kPackFrom && p.depth <= kBlockDepth && q.depth <= kBlockDepth) return panels(M, N, p, q, c, scratch);
    blocks(M, N, p, c, scratch);
    if (q.depth > 0) blocks(M, N, q, c.again(), scratch);
}
