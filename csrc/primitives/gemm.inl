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

// Rows of a panel of B, `ld` apart.
template <class S>
struct Rows {
    const S* p;
    long ld;
};

// What two neighbouring panels of C are made from, or one, where tiles are narrow or no other is left.
template <class S>
struct TileOperands {
    long depth;
    const S* a;
    long rs, cs;
    Rows<S> b[2];
};

// The hardware does not see that tiles go through A in order, several rows at once. The widest tiles fetch ahead: rows
// of the next tile where rows are contiguous, this tile's numbers of some products later where columns are.
constexpr long kAhead = 8;

// MR rows by NV vectors of C in registers, from row `top` of the operands on. Edge: fewer columns than NV vectors hold.
template <class S, int MR, int NV, bool Edge>
__attribute__((noinline)) void tile(const TileOperands<S>* operands, long top, const Result<S>& c, long columns) {
    constexpr long L = lanes<S>;
    const EdgeOf<S> edge(columns - (NV - 1) * L);  // only the last vector is ragged
    auto read = [&](const S* p, int v) { return Edge && v == NV - 1 ? load_edge(p + v * L, edge) : load(p + v * L); };
    vec<S> acc[MR][NV];
    const bool scaled = c.scale != S(1);
    if (c.source && !scaled) {
#pragma GCC unroll 32
        for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) acc[r][v] = read(c.source + r * c.ld, v);
    } else {
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            vec<S> start = c.bias ? read(c.bias, v) : vec<S>{};
#pragma GCC unroll 32
            for (int r = 0; r < MR; ++r) acc[r][v] = start;
        }
    }
    for (int t = 0; t < kProducts && operands[t].depth > 0; ++t) {
        const auto& [depth, start, rs, cs, from] = operands[t];
        // one pointer for three rows: a and two offsets that addresses can hold
        constexpr int kPointers = (MR + 2) / 3;
        const S *a[kPointers], *b = from[0].p, *next = from[1].p;
#pragma GCC unroll 32
        for (int i = 0; i < kPointers; ++i) a[i] = start + (top + 3 * i) * rs;
        const S* ahead = cs == 1 ? start + (top + MR) * rs : a[0] + kAhead * cs;
        const long pace = cs == 1 ? MR : cs;
        for (long k = depth; k > 0; --k) {
            if (NV == 4) {
                __builtin_prefetch(ahead);
                ahead += pace;
            }
            vec<S> bv[NV];
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
                const S* p = v < 2 ? b + v * L : next + (v - 2) * L;
                bv[v] = Edge && kMaskedEdges<S> && v == NV - 1 ? load_edge(p, edge) : load(p);
            }
#pragma GCC unroll 32
            for (int r = 0; r < MR; ++r) {
                S x = a[r / 3][r % 3 * rs];
#pragma GCC unroll 4
                for (int v = 0; v < NV; ++v) acc[r][v] += x * bv[v];
            }
#pragma GCC unroll 32
            for (int i = 0; i < kPointers; ++i) a[i] += cs;
            b += from[0].ld;
            if (NV > 2) next += from[1].ld;
        }
    }
#pragma GCC unroll 32
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            if (scaled) acc[r][v] = read(c.source + r * c.ld, v) + c.scale * acc[r][v];
            if (Edge && v == NV - 1)
                store_edge(c.p + r * c.ld + v * L, acc[r][v], edge);
            else
                store(c.p + r * c.ld + v * L, acc[r][v]);
        }
}

template <class S>
using Tile = void (*)(const TileOperands<S>*, long, const Result<S>&, long);

// Tiles by height: tiles<S, NV, Edge>[rows - 1].
template <class S, int NV, bool Edge, int... MR>
inline Tile<S> pick(unsigned rows, Heights<MR...>) {
    static constexpr Tile<S> table[] = {tile<S, MR + 1, NV, Edge>...};
    return table[rows - 1];
}

// All rows of C for the columns of NV vectors, in tiles of nearly equal height.
template <class S, int NV, bool Edge>
inline void column_block(long M, const TileOperands<S>* operands, const Result<S>& c, long columns) {
    constexpr HeightsTo<tile_rows(NV)> heights;
    if (M <= tile_rows(NV)) return pick<S, NV, Edge>(unsigned(M), heights)(operands, 0, c, columns);
    unsigned tiles = (unsigned(M) + tile_rows(NV) - 1) / tile_rows(NV);
    unsigned low = unsigned(M) / tiles, higher = unsigned(M) - low * tiles;
    for (unsigned i = 0, done = 0; i < tiles; ++i) {
        unsigned rows = low + (i < higher);
        pick<S, NV, Edge>(rows, heights)(operands, done, c.at(done, 0), columns);
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

constexpr long kBlockRows = 256, kBlockDepth = 128;  // A's block stays in L2, B's panels in L1
constexpr long kPackFrom = 48;                       // rows of A from which packing B pays

// The columns from `j` on of a term's B as rows of `width`, `columns` of which are B's; copied where many rows of A or
// a ragged edge ask for it.
template <class S>
inline Rows<S> rows_of(const Product<S>& term, long j, long columns, long width, bool many, S* scratch) {
    const auto& [K, a, b, from] = term;
    if (b.packed) return {b.p + j * b.ld + from * width, width};
    const S* bj = b.p + from * b.ld + j;
    if (!many && (kMaskedEdges<S> || b.padded || columns == width)) return {bj, b.ld};
    pack(K, columns, bj, b.ld, scratch);
    return {scratch, width};
}

// All of C from terms of at most kBlockDepth, two panels at a time where tiles are wide enough.
template <class S>
inline void panels(long M, long N, const Product<S>& p, const Product<S>& q, const Result<S>& c, S* scratch) {
    constexpr long L = lanes<S>;
    const bool many = M >= kPackFrom;
    const Product<S>* const terms[kProducts] = {&p, &q};
    for (long j = 0; j < N;) {
        long widths[2] = {panel_width(N, j, L), 0};
        if (kWide && j + widths[0] < N) widths[1] = panel_width(N, j + widths[0], L);
        long width = widths[0] + widths[1], columns = least(width, N - j);
        TileOperands<S> operands[kProducts] = {};
        for (int t = 0; t < kProducts && terms[t]->depth > 0; ++t) {
            const Product<S>& term = *terms[t];
            S* copy = scratch + t * kBlockDepth * kPanels * 2 * L;
            operands[t] = {term.depth, term.a.p, term.a.rs, term.a.cs, {}};
            operands[t].b[0] = rows_of(term, j, least(columns, widths[0]), widths[0], many, copy);
            if (widths[1])
                operands[t].b[1] =
                    rows_of(term, j + widths[0], columns - widths[0], widths[1], many, copy + kBlockDepth * widths[0]);
        }
        by_width<S>(columns, [&](auto vectors, auto ragged) {
            column_block<S, vectors.value, ragged.value>(M, operands, c.at(0, j), columns);
        });
        j += width;
    }
}

// f(first, last) for 0 … n in nearly equal blocks of at most `most`.
template <class F>
inline void each_block(long n, long most, F f) {
    for (long i = 0, blocks = ceil_div(n, most); i < blocks; ++i) f(i * n / blocks, (i + 1) * n / blocks);
}

// One term, cut into blocks of rows and depth; a second one has to fit into a block with it.
template <class S>
inline void blocks(long M, long N, const Product<S>& p, const Product<S>& q, Result<S> c, S* scratch) {
    each_block(p.depth, kBlockDepth, [&](long k, long end) {
        each_block(M, kBlockRows, [&](long m, long bottom) {
            auto part = [=](const Product<S>& t, long first, long last) {
                return Product<S>{last - first, {t.a.p + m * t.a.rs + first * t.a.cs, t.a.rs, t.a.cs}, t.b, first};
            };
            panels(bottom - m, N, part(p, k, end), part(q, 0, q.depth), c.at(m, 0), scratch);
        });
        c = c.again();
    });
}

// Scratch: kPanels panels of kBlockDepth rows for each term.
template <class S>
__attribute__((noinline)) void gemm(long M, long N, const Product<S>& p, const Product<S>& q, const Result<S>& c,
                                    S* scratch) {
    if (N == 1 && c.ld == 1 && along_vectors(p) && along_vectors(q)) return dots(M, p, q, c);
    if (M < kPackFrom && p.depth <= kBlockDepth && q.depth <= kBlockDepth) return panels(M, N, p, q, c, scratch);
    if (p.depth + q.depth <= kBlockDepth) return blocks(M, N, p, q, c, scratch);
    blocks(M, N, p, {}, c, scratch);
    if (q.depth > 0) blocks(M, N, q, {}, c.again(), scratch);
}
