// Large pages for large results: the system hands out new memory page by page, and that
// of small pages takes as long as to compute what fills them.
#pragma once

#include <cstdint>
#include <vector>

#include "common/cpu/parallel.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fisherprune::cpu {

// Memory that nothing was written to yet.
struct Fresh {
  void* data;
  int64_t bytes;
};

// Asks for large pages, and touches each of them once: later several threads would meet
// in a page, and each of them would clear it.
inline void prefer_large_pages(const std::vector<Fresh>& results,
                               const Parallel& parallel) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  std::vector<uint8_t*> pages;
  for (const Fresh& each : results) {
    const uintptr_t first = reinterpret_cast<uintptr_t>(each.data);
    const uintptr_t begin = (first + page - 1) / page * page;
    const uintptr_t end = (first + static_cast<uintptr_t>(each.bytes)) / page * page;
    if (begin >= end) continue;
    if (madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE)) continue;
    for (uintptr_t at = begin; at < end; at += page)
      pages.push_back(reinterpret_cast<uint8_t*>(at));
  }
  if (!pages.empty())
    for_each_task(parallel, pages.size(), [&](int64_t i) { *pages[i] = 0; });
#else
  (void)results, (void)parallel;
#endif
}

}  // namespace fisherprune::cpu
