// Random numbers from a counter: Philox 4x32 with ten rounds (Salmon et al., Parallel random numbers: as easy as 1, 2,
// 3, SC 2011). Element e of a draw has word e mod 4 of
//   philox(counter = (e div 4, draw, pass, task), key = seed)
// and is its upper 24 bits over 2^24: in [0, 1), the same in every type, on every backend.

constexpr long kDrawn = 64;  // counters that are worked on at once

// The four words of counters first, first + 1, …; word j of the i-th is words[j][i].
inline void philox(const Draw& d, std::uint32_t first, std::uint32_t (&words)[4][kDrawn]) {
    for (long i = 0; i < kDrawn; ++i) {
        words[0][i] = first + std::uint32_t(i);
        words[1][i] = d.number;
        words[2][i] = d.pass;
        words[3][i] = d.task;
    }
    std::uint32_t k0 = std::uint32_t(d.seed), k1 = std::uint32_t(d.seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
        for (long i = 0; i < kDrawn; ++i) {
            const std::uint64_t a = std::uint64_t(0xD2511F53u) * words[0][i],
                                b = std::uint64_t(0xCD9E8D57u) * words[2][i];
            const std::uint32_t w1 = words[1][i], w3 = words[3][i];
            words[0][i] = std::uint32_t(b >> 32) ^ w1 ^ k0;
            words[1][i] = std::uint32_t(b);
            words[2][i] = std::uint32_t(a >> 32) ^ w3 ^ k1;
            words[3][i] = std::uint32_t(a);
        }
}

// Elements [first, first + n) of a draw.
template <class S>
void draw_run(const Draw& d, long first, long n, S* y) {
    std::uint32_t words[4][kDrawn];
    S drawn[4 * kDrawn];
    for (long done = 0; done < n;) {
        const long counter = (first + done) / 4, skipped = (first + done) % 4;
        const long count = least(n - done, 4 * kDrawn - skipped);
        philox(d, std::uint32_t(counter), words);
        for (long i = 0; i < kDrawn; ++i)
            for (int j = 0; j < 4; ++j) drawn[4 * i + j] = S(std::int32_t(words[j][i] >> 8)) * S(0x1p-24);
        copy(drawn + skipped, y + done, count);
        done += count;
    }
}
