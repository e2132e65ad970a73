// C = alpha · A B + source + bias, with B in packed panels or in place.

// A: element (m, k) at p[m·rs + k·cs].
template <class S>
struct Left {
    const S* p;
    long rs, cs;
};

// B: element (k, n). In place: p[k·ld + n]. Packed: panels of `panel_width` columns, each k-major.
template <class S>
struct Right {
    const S* p;
    long ld;
    bool packed;
    bool padded;  // reading a vector past the end of a row is allowed
};

template <class S>
struct Result {
    S* p;
    long ld;
    S alpha;
    const S* source;  // laid out like p, may be p itself; null for none
    const S* bias;    // per column; null for none
};

constexpr long tile_rows(int vectors) {
    return vectors == 2 || MAML_FAST_ROWS > 6 ? MAML_FAST_ROWS : 2 * MAML_FAST_ROWS;
}

// MR rows by NV vectors of C in registers.
template <class S, int MR, int NV>
inline void tile(long K, const S* a, long rs, long cs, const S* b, long ldb, const Result<S>& c, long columns) {
    constexpr long L = lanes<S>;
    vec<S> acc[MR][NV];
    for (int r = 0; r < MR; ++r)
        for (int v = 0; v < NV; ++v) acc[r][v] = vec<S>{};
    const S* row[MR];
    for (int r = 0; r < MR; ++r) row[r] = a + r * rs;
    for (long k = 0, ka = 0; k < K; ++k, ka += cs, b += ldb) {
        vec<S> bv[NV];
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) bv[v] = load(b + v * L);
#pragma GCC unroll 32
        for (int r = 0; r < MR; ++r) {
            S x = row[r][ka];
#pragma GCC unroll 2
            for (int v = 0; v < NV; ++v) acc[r][v] += x * bv[v];
        }
    }
    if (columns == NV * L) {
#pragma GCC unroll 32
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < NV; ++v) {
                vec<S> out = c.alpha * acc[r][v];
                if (c.source) out += load(c.source + r * c.ld + v * L);
                if (c.bias) out += load(c.bias + v * L);
                store(c.p + r * c.ld + v * L, out);
            }
        return;
    }
    S spill[NV * L];
    for (int r = 0; r < MR; ++r) {
        for (int v = 0; v < NV; ++v) store(spill + v * L, acc[r][v]);
        for (long j = 0; j < columns; ++j) {
            S out = c.alpha * spill[j];
            if (c.source) out += c.source[r * c.ld + j];
            if (c.bias) out += c.bias[j];
            c.p[r * c.ld + j] = out;
        }
    }
}

template <class S, int NV, int MR = tile_rows(NV)>
inline void tile_of(long rows, long K, const S* a, long rs, long cs, const S* b, long ldb, const Result<S>& c,
                    long columns) {
    if constexpr (MR > 1) {
        if (rows < MR) return tile_of<S, NV, MR - 1>(rows, K, a, rs, cs, b, ldb, c, columns);
    }
    tile<S, MR, NV>(K, a, rs, cs, b, ldb, c, columns);
}

// All rows of C for the columns of one panel, in tiles of nearly equal height.
template <class S, int NV>
__attribute__((noinline)) void panel(long M, long K, const Left<S>& a, const S* b, long ldb, const Result<S>& c, long columns) {
    long tiles = ceil_div(M, tile_rows(NV)), done = 0;
    for (long i = 0; i < tiles; ++i) {
        long rows = (M - done) / (tiles - i);
        Result<S> ci{c.p + done * c.ld, c.ld, c.alpha, c.source ? c.source + done * c.ld : nullptr, c.bias};
        tile_of<S, NV>(rows, K, a.p + done * a.rs, a.rs, a.cs, b, ldb, ci, columns);
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

// The transpose of row-major W (N × K) into panels of a K × N matrix.
template <class S>
inline void pack_transposed(long K, long N, const S* w, S* out) {
    for (long j = 0; j < N;) {
        long width = panel_width(N, j, lanes<S>), columns = least(width, N - j);
        for (long n = 0; n < columns; ++n) {
            const S* row = w + (j + n) * K;
            for (long k = 0; k < K; ++k) out[k * width + n] = row[k];
        }
        for (long n = columns; n < width; ++n)
            for (long k = 0; k < K; ++k) out[k * width + n] = S(0);
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

template <class S>
__attribute__((noinline)) void gemm(long M, long N, long K, Left<S> a, Right<S> b, Result<S> c, S* scratch) {
    constexpr long L = lanes<S>;
    bool ragged = N % L != 0;
    bool pack_all = !b.packed && M >= kPackFrom;
    long depth_blocks = ceil_div(K, kBlockDepth);
    for (long kb = 0, k0 = 0; kb < depth_blocks; ++kb) {
        long depth = (K - k0) / (depth_blocks - kb);
        if (pack_all) pack(depth, N, b.p + k0 * b.ld, b.ld, scratch);
        Result<S> ck = k0 == 0 ? c : Result<S>{c.p, c.ld, c.alpha, c.p, nullptr};
        for (long m0 = 0; m0 < M; m0 += kBlockRows) {
            long rows = least(kBlockRows, M - m0);
            Left<S> am{a.p + m0 * a.rs + k0 * a.cs, a.rs, a.cs};
            for (long j = 0; j < N;) {
                long width = panel_width(N, j, L), columns = least(width, N - j);
                const S* bj;
                long ldb = width;
                if (b.packed) {
                    bj = b.p + j * K + k0 * width;
                } else if (pack_all) {
                    bj = scratch + j * depth;
                } else if (ragged && columns < width && !b.padded) {
                    pack(depth, columns, b.p + k0 * b.ld + j, b.ld, scratch);
                    bj = scratch;
                } else {
                    bj = b.p + k0 * b.ld + j;
                    ldb = b.ld;
                }
                Result<S> cj{ck.p + m0 * c.ld + j, c.ld, c.alpha, ck.source ? ck.source + m0 * c.ld + j : nullptr,
                             ck.bias ? ck.bias + j : nullptr};
                if (width == L)
                    panel<S, 1>(rows, depth, am, bj, ldb, cj, columns);
                else
                    panel<S, 2>(rows, depth, am, bj, ldb, cj, columns);
                j += width;
            }
        }
        k0 += depth;
    }
}
