// Where the elements of a convolution meet, worked out once per plan. Everything is channels last: a sample is
// (y, x, channel), an offset counts elements inside a sample.
#pragma once

#include <list>
#include <vector>

namespace maml_fast {

// A window that slides over a sample: of a convolution or a pool. One-dimensional layers have height 1.
struct Window {
    long h, w, oh, ow;
    long kh, kw, sh, sw, ph, pw, dh, dw;
};

// A run of taps whose inputs are neighbours in memory: `depth` elements from `a` on meet `depth` rows of the
// weights from row `b` on.
struct Segment {
    long a, b, depth;
};

// Positions that meet the same taps: an ny × nx lattice in the result and in the source of a product. Splitting the
// border off like this, nothing is padded and nothing is multiplied by zero.
struct Region {
    long ny, nx;
    long from, from_y, from_x;
    long to, to_y, to_x;
    const Segment* segments;
    int n;
};

// A convolution's products; `groups` share the regions, their channels are offsets on top.
struct Convolution {
    Window window;
    long channels, outputs, groups;  // channels in and out, over all groups
    const Region *forward, *backward;
    int n_forward, n_backward;
    // One region per tap of the kernel: the positions where it meets the input (weight gradient; no segments).
    const Region* taps;
    bool one_lattice;  // all taps meet it everywhere: without padding

    long kernel() const { return window.kh * window.kw; }
    long group_channels() const { return channels / groups; }
    long group_outputs() const { return outputs / groups; }
    // Depthwise: every channel meets a kernel of its own, and products run through all of them at once.
    bool depthwise() const { return groups > 1 && groups == channels && groups == outputs; }
    long passes() const { return depthwise() ? 1 : groups; }
    long pass_outputs() const { return outputs / passes(); }
    long pass_channels() const { return channels / passes(); }
    long in_size() const { return window.h * window.w * channels; }
    long out_size() const { return window.oh * window.ow * outputs; }
};

// Owns a convolution's tables. The backward product's weights are stored with the kernel flipped.
class ConvolutionTables {
  public:
    ConvolutionTables(const Window& window, long channels, long outputs, long groups);
    const Convolution& view() const { return view_; }

  private:
    Convolution view_{};
    std::vector<Region> forward_, backward_, taps_;
    std::list<std::vector<Segment>> segments_;  // regions point into them
};

}  // namespace maml_fast
