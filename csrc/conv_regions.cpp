#include "conv_regions.h"

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

// The outputs that a tap meets: an interval along the axis.
struct Interval {
    long first, count;
};

Interval met(const Axis& a, long tap) {
    Interval outputs{0, 0};
    for (long o = 0; o < a.out; ++o) {
        long i = o * a.stride - a.padding + tap * a.dilation;
        if (i < 0 || i >= a.in) continue;
        if (outputs.count == 0) outputs.first = o;
        ++outputs.count;
    }
    return outputs;
}

// Neighbours merge into one segment: the next tap's inputs follow at once, and so do its weights.
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

// One side of a product: how wide an image is and how many channels it has.
struct Side {
    long width, channels;
};

// The taps of a region in the order of their weights; `rows` of the weights belong to each.
std::vector<Segment> segments_of(const Run& y, const Run& x, const Side& from, const Window& w, long groups, long rows,
                                 bool flipped) {
    std::vector<Segment> segments;
    long across = long(x.taps.size()), taps = long(y.taps.size()) * across;
    for (long i = 0; i < taps; ++i) {
        long t = flipped ? taps - 1 - i : i, p = t / across, q = t % across;
        long tap = y.taps[p] * w.kw + x.taps[q], place = flipped ? w.kh * w.kw - 1 - tap : tap;
        append(segments, {(y.from[p] * from.width + x.from[q]) * from.channels, place * rows, from.channels / groups},
               groups == 1);
    }
    return segments;
}

Region region_of(const Run& y, const Run& x, const Side& from, const Side& to, const std::vector<Segment>& segments) {
    return {y.count,
            x.count,
            0,
            y.from_step * from.width * from.channels,
            x.from_step * from.channels,
            (y.to * to.width + x.to) * to.channels,
            y.to_step * to.width * to.channels,
            x.to_step * to.channels,
            segments.data(),
            int(segments.size())};
}

}  // namespace

ConvolutionTables::ConvolutionTables(const Window& w, long channels, long outputs, long groups) {
    const Axis y{w.h, w.oh, w.kh, w.sh, w.ph, w.dh}, x{w.w, w.ow, w.kw, w.sw, w.pw, w.dw};
    const Side in{w.w, channels}, out{w.ow, outputs};
    for (const Run& a : forward_runs(y))
        for (const Run& b : forward_runs(x)) {
            segments_.push_back(segments_of(a, b, in, w, groups, channels / groups, false));
            forward_.push_back(region_of(a, b, in, out, segments_.back()));
        }
    for (const Run& a : backward_runs(y))
        for (const Run& b : backward_runs(x)) {
            segments_.push_back(segments_of(a, b, out, w, groups, outputs, true));
            backward_.push_back(region_of(a, b, out, in, segments_.back()));
        }
    view_.one_lattice = true;
    for (long ky = 0; ky < w.kh; ++ky)
        for (long kx = 0; kx < w.kw; ++kx) {
            Interval ys = met(y, ky), xs = met(x, kx);
            if (ys.count == 0 || xs.count == 0) ys = xs = {0, 0};
            long top = ys.first * w.sh - w.ph + ky * w.dh, left = xs.first * w.sw - w.pw + kx * w.dw;
            long from = ys.count ? (top * w.w + left) * channels : 0;
            taps_.push_back({ys.count, xs.count, from, w.sh * w.w * channels, w.sw * channels,
                             (ys.first * w.ow + xs.first) * outputs, w.ow * outputs, outputs, nullptr, 0});
            view_.one_lattice = view_.one_lattice && ys.count == w.oh && xs.count == w.ow;
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
