// Shapes of the register tiles that all products are made of.

constexpr int kTileRows = MAML_FAST_ROWS;  // of tiles two vectors wide

// With 32 registers tiles are up to four vectors wide: half as many numbers of A are read for a product.
constexpr bool kWide = kTileRows > 6;
constexpr long kWidest = kWide ? 4 : 2;

// Heights that keep the accumulators in registers and the multipliers busy.
constexpr int tile_rows(int vectors) {
    if (kWide) return vectors < 3 ? kTileRows : 2 * kTileRows / vectors;
    return vectors == 2 ? kTileRows : 2 * kTileRows;
}

template <int N>
struct Vectors {
    static constexpr int value = N;
};

// f(vectors, ragged) for the tile of `columns` columns: how many vectors wide it is, and whether they hold more.
template <class S, class F>
inline auto by_width(long columns, F f) {
    long vectors = ceil_div(columns, lanes<S>);
    bool ragged = columns < vectors * lanes<S>;
    auto width = [&](auto v) { return ragged ? f(v, std::true_type{}) : f(v, std::false_type{}); };
    if constexpr (kWide) {
        if (vectors == 4) return width(Vectors<4>{});
        if (vectors == 3) return width(Vectors<3>{});
    }
    return vectors == 2 ? width(Vectors<2>{}) : width(Vectors<1>{});
}
