// Where positions of a window, or of a tap, lie inside of an image.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/integers.h"

namespace fisherprune::cpu::grad_moments {

// The entries [begin, end) of an axis; none where end <= begin.
struct Inside {
  int64_t begin, end;
};

// Of `count` entries, the first of which lies at `first` of an image of `size`, and
// each `step` behind the one before.
inline Inside inside_of(int64_t first, int64_t step, int64_t count, int64_t size) {
  const int64_t begin = first < 0 ? ceil_div(-first, step) : 0;
  const int64_t end = first < size ? ceil_div(size - first, step) : 0;
  return {std::min(begin, count), std::clamp(end, std::min(begin, count), count)};
}

}  // namespace fisherprune::cpu::grad_moments
