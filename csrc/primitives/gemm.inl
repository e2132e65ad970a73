// C = A B + (source | bias | 0), with B in packed panels or in place.

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

// Where C goes and what the sum starts from: source (laid out like p, may be p itself), a bias per
// column, or zero where both are null; at most one is given.
template <class S>
struct Result {
    S* p;
    long ld;
    const S* source;
    const S* bias;

    Result at(long row, long column) const {
        return {p + row * ld + column, ld, source ? source + row * ld + column : nullptr,
                bias ? bias + column : nullptr};
    }
};

// Tile heights that keep the accumulators in registers and the multipliers busy.
constexpr int tile_rows(int vectors) {
    return vectors == 2 || MAML_FAST_ROWS > 6 ? MAML_FAST_ROWS : 2 * MAML_FAST_ROWS;
}

// MR rows by NV vectors of C in registers. Edge: fewer columns than NV vectors hold.
template <class S, int MR, int NV, bool Edge>
__attribute__((noinline)) void tile(long K, const S* a, long rs, long cs, const S* b, long ldb, const Result<S>& c,
                                    long columns) {
    constexpr long L = lanes<S>;
    const EdgeOf<S> edge(columns - (NV - 1) * L);  // only the last vector is ragged
    auto read = [&](const S* p, int v) { return Edge && v == NV - 1 ? load_edge(p + v * L, edge) : load(p + v * L); };
    vec<S> acc[MR][NV];
    if (c.source) {
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
    const S* row[MR];
#pragma GCC unroll 32
    for (int r = 0; r < MR; ++r) row[r] = a + r * rs;
    for (long k = 0, ka = 0; k < K; ++k, ka += cs, b += ldb) {
        vec<S> bv[NV];
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v)
            bv[v] = Edge && kMaskedEdges<S> && v == NV - 1 ? load_edge(b + v * L, edge) : load(b + v * L);
#pragma GCC unroll 32
        for (int r = 0; r < MR; ++r) {
            S x = row[r][ka];
#pragma GCC unroll 2
            for (int v = 0; v < NV; ++v) acc[r][v] += x * bv[v];
        }
    }
#pragma GCC unroll 32
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) {
            if (Edge && v == NV - 1)
                store_edge(c.p + r * c.ld + v * L, acc[r][v], edge);
            else
                store(c.p + r * c.ld + v * L, acc[r][v]);
        }
}

template <class S>
using Tile = void (*)(long, const S*, long, long, const S*, long, const Result<S>&, long);

// Tiles by height: tiles<S, NV, Edge>[rows - 1].
template <class S, int NV, bool Edge, int... MR>
inline Tile<S> pick(unsigned rows, Heights<MR...>) {
    static constexpr Tile<S> table[] = {tile<S, MR + 1, NV, Edge>...};
    return table[rows - 1];
}

// All rows of C for the columns of one panel, in tiles of nearly equal height.
template <class S, int NV, bool Edge>
inline void panel(long M, long K, const Left<S>& a, const S* b, long ldb, const Result<S>& c, long columns) {
    unsigned tiles = (unsigned(M) + tile_rows(NV) - 1) / tile_rows(NV);
    unsigned low = tiles > 1 ? unsigned(M) / tiles : unsigned(M), higher = unsigned(M) - low * tiles;
    for (unsigned i = 0, done = 0; i < tiles; ++i) {
        unsigned rows = low + (i < higher);
        pick<S, NV, Edge>(rows, HeightsTo<tile_rows(NV)>{})(K, a.p + done * a.rs, a.rs, a.cs, b, ldb, c.at(done, 0),
                                                            columns);
        done += rows;
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
inline void pack_transposed(long K, long N, const S* w, S* out) {
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

// Numbers of scratch that `gemm` needs for an unpacked B of N columns.
template <class S>
inline long gemm_scratch(long N) {
    return packed_size(kBlockDepth, N, lanes<S>);
}

// One block of rows: all panels of B, from row k0 of B on, K rows deep.
template <class S>
inline void panels(long M, long N, long k0, long K, const Left<S>& a, const Right<S>& b, const Result<S>& c,
                   S* scratch) {
    constexpr long L = lanes<S>;
    for (long j = 0; j < N;) {
        long width = panel_width(N, j, L), columns = least(width, N - j);
        const S* bj = b.packed ? b.p + j * b.ld + k0 * width : b.p + k0 * b.ld + j;
        long ldb = b.packed ? width : b.ld;
        if (!kMaskedEdges<S> && !b.packed && !b.padded && columns < width) {
            pack(K, columns, bj, ldb, scratch);
            bj = scratch;
            ldb = width;
        }
        if (columns == width)
            width == L ? panel<S, 1, false>(M, K, a, bj, ldb, c.at(0, j), columns)
                       : panel<S, 2, false>(M, K, a, bj, ldb, c.at(0, j), columns);
        else
            width == L ? panel<S, 1, true>(M, K, a, bj, ldb, c.at(0, j), columns)
                       : panel<S, 2, true>(M, K, a, bj, ldb, c.at(0, j), columns);
        j += width;
    }
}

template <class S>
__attribute__((noinline)) void gemm(long M, long N, long K, const Left<S>& a, const Right<S>& b, const Result<S>& c,
                                    S* scratch) {
    if (M < kPackFrom && K <= kBlockDepth) return panels(M, N, 0, K, a, b, c, scratch);
    long blocks = ceil_div(K, kBlockDepth);
    for (long k0 = 0, left = blocks; left > 0; --left) {
        long depth = (K - k0) / left;
        Right<S> bk = b;
        long kb = k0;
        if (!b.packed && M >= kPackFrom) {
            pack(depth, N, b.p + k0 * b.ld, b.ld, scratch);
            bk = {scratch, depth, true, true};
            kb = 0;
        }
        for (long m = 0; m < M; m += kBlockRows) {
            long rows = least(kBlockRows, M - m);
            Result<S> cm = c.at(m, 0);
            if (k0 > 0) cm = {cm.p, cm.ld, cm.p, nullptr};
            panels(rows, N, kb, depth, {a.p + m * a.rs + k0 * a.cs, a.rs, a.cs}, bk, cm, scratch);
        }
        k0 += depth;
    }
}
