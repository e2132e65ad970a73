// How a norm over channels goes over the rows of an image, and which rows a pool behind it puts under a window.

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
