// Memory that kernels work in: aligned to cache lines, and in huge pages where it is large.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace maml_fast {

template <class S>
struct Free {
    void operator()(S* p) const { std::free(p); }
};
template <class S>
using Buffer = std::unique_ptr<S[], Free<S>>;

template <class S>
Buffer<S> allocate(long count) {
    constexpr std::size_t kLine = 64, kHugePage = 2 << 20;
    std::size_t bytes = std::size_t(count) * sizeof(S) + 1;
    bool large = bytes >= kHugePage;
    std::size_t alignment = large ? kHugePage : kLine;
    bytes = (bytes + alignment - 1) / alignment * alignment;
    S* p = static_cast<S*>(std::aligned_alloc(alignment, bytes));
    if (!p) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (large) madvise(p, bytes, MADV_HUGEPAGE);  // a wish: without it the pages are small
#endif
    return Buffer<S>(p);
}

}  // namespace maml_fast
