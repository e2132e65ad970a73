#include "spatial.h"

namespace maml_fast {

namespace {

// Along one axis: `count` results from `to` on, every `to_step`-th; the source of tap taps[i] for the first of them is
// at from[i], and moves by `from_step`.
struct Run {
    long count, to, to_step, from_step;
    std::vector<long> taps, from;
};

struct Axis {
    long in, out, kernel, stride, padding, dilation;
};

// Cuts positions 0, step, 2 step, … < end into runs with the same taps; source(position, tap) is −1 where there is
// none.
template <class F>
void cut(long start, long step, long end, long from_step, long kernel, F source, std::vector<Run>& runs) {
    bool open = false;
    for (long i = start; i < end; i += step) {
        std::vector<long> taps, from;
        for (long k = 0; k < kernel; ++k)
            if (long s = source(i, k); s >= 0) {
                taps.push_back(k);
                from.push_back(s);
            }
        if (open && runs.back().taps == taps)
            ++runs.back().count;
        else
            runs.push_back({1, i, step, from_step, taps, from});
        open = true;
    }
}

std::vector<Run> forward_runs(const Axis& a) {
    std::vector<Run> runs;
    auto source = [&](long o, long k) {
        long i = o * a.stride - a.padding + k * a.dilation;
        return i >= 0 && i < a.in ? i : -1;
    };
    cut(0, 1, a.out, a.stride, a.kernel, source, runs);
    return runs;
}

std::vector<Run> backward_runs(const Axis& a) {
    std::vector<Run> runs;
    auto source = [&](long i, long k) {
        long o = i + a.padding - k * a.dilation;
        return o >= 0 && o % a.stride == 0 && o / a.stride < a.out ? o / a.stride : -1;
    };
    for (long residue = 0; residue < a.stride; ++residue) cut(residue, a.stride, a.in, 1, a.kernel, source, runs);
    return runs;
}

// Neighbours merge into one segment: the next tap's inputs stand right behind, and so do its weights.
void append(std::vector<Segment>& segments, Segment next, bool merge) {
    if (merge && !segments.empty()) {
        Segment& last = segments.back();
        if (last.a + last.depth == next.a && last.b + last.depth == next.b) {
            last.depth += next.depth;
            return;
        }
    }
    segments.push_back(next);
}

}  // namespace

ConvolutionTables::ConvolutionTables(const Window& w, long channels, long outputs, long groups) {
    const Axis y{w.h, w.oh, w.kh, w.sh, w.ph, w.dh}, x{w.w, w.ow, w.kw, w.sw, w.pw, w.dw};
    auto regions = [&](const std::vector<Run>& ys, const std::vector<Run>& xs, long from_width, long to_width,
                       long from_c, long to_c, long depth, bool turned, std::vector<Region>& out) {
        for (const Run& a : ys)
            for (const Run& b : xs) {
                auto& segments = *segments_.emplace_back(std::make_unique<std::vector<Segment>>());
                long n = long(a.taps.size() * b.taps.size()), ny = long(a.taps.size()), nx = long(b.taps.size());
                for (long i = 0; i < n; ++i) {
                    long t = turned ? n - 1 - i : i, p = t / nx, q = t % nx;
                    long tap = a.taps[p] * w.kw + b.taps[q], row = turned ? w.kh * w.kw - 1 - tap : tap;
                    long rows = turned ? outputs : channels / groups;
                    append(segments, {(a.from[p] * from_width + b.from[q]) * from_c, row * rows, depth}, groups == 1);
                }
                (void)ny;
                out.push_back({a.count, b.count, 0, a.from_step * from_width * from_c, b.from_step * from_c,
                               (a.to * to_width + b.to) * to_c, a.to_step * to_width * to_c, b.to_step * to_c,
                               segments.data(), int(segments.size())});
            }
    };
    regions(forward_runs(y), forward_runs(x), w.w, w.ow, channels, outputs, channels / groups, false, forward_);
    regions(backward_runs(y), backward_runs(x), w.ow, w.w, outputs, channels, outputs / groups, true, backward_);

    // The outputs that a tap meets form an interval along each axis.
    auto interval = [](const Axis& a, long k) {
        long first = -1, count = 0;
        for (long o = 0; o < a.out; ++o) {
            long i = o * a.stride - a.padding + k * a.dilation;
            if (i < 0 || i >= a.in) continue;
            if (first < 0) first = o;
            ++count;
        }
        return std::pair<long, long>(first, count);
    };
    view_.one_lattice = true;
    for (long ky = 0; ky < w.kh; ++ky)
        for (long kx = 0; kx < w.kw; ++kx) {
            auto [y0, ny] = interval(y, ky);
            auto [x0, nx] = interval(x, kx);
            long iy = y0 * w.sh - w.ph + ky * w.dh, ix = x0 * w.sw - w.pw + kx * w.dw;
            bool some = ny > 0 && nx > 0;
            taps_.push_back({some ? ny : 0, some ? nx : 0, some ? (iy * w.w + ix) * channels : 0, w.sh * w.w * channels,
                             w.sw * channels, some ? (y0 * w.ow + x0) * outputs : 0, w.ow * outputs, outputs, nullptr,
                             0});
            view_.one_lattice = view_.one_lattice && ny == w.oh && nx == w.ow;
        }
    view_.window = w;
    view_.channels = channels;
    view_.outputs = outputs;
    view_.groups = groups;
    view_.forward = forward_.data();
    view_.n_forward = int(forward_.size());
    view_.backward = backward_.data();
    view_.n_backward = int(backward_.size());
    view_.taps = taps_.data();
}

}  // namespace maml_fast
