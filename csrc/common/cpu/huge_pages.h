// Pages of 2 MB for large fresh memory: to touch it for the first time in pages of 4 KB
// takes longer than to fill it.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fisherprune::cpu {

constexpr uintptr_t kHugePage = uintptr_t{2} << 20;

// The first and the end of some huge pages; equal where there are none.
struct HugePages {
  uintptr_t first = 0, last = 0;
};

// Asks Linux for huge pages within these bytes; returns them where it agrees.
inline HugePages ask_for_huge_pages(const void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  if (first < last &&
      !madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE))
    return {first, last};
#else
  (void)data, (void)bytes;
#endif
  return {};
}

}  // namespace fisherprune::cpu
