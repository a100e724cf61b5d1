// A tile of moments as it lies in an accumulator: some consecutive rows of the patch
// for some outputs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/integers.h"
#include "grad_moments/cpu/microkernel.h"

namespace fisherprune::cpu::grad_moments {

struct AccumulatorTile {
  float* first;
  int64_t output_stride;
  int64_t rows, outputs;

  // Asks for a part of the tile, while its moments are computed. The tile lies in as
  // many pages as it has outputs, and no hardware prefetcher follows that.
  void prefetch(int64_t part, int64_t parts) const {
    constexpr int64_t kLineFloats = 16;
    const int64_t share = ceil_div(outputs, parts);
    const int64_t last = std::min((part + 1) * share, outputs);
    for (int64_t output = part * share; output < last; ++output) {
      const float* const row = first + output * output_stride;
      for (int64_t i = 0; i < rows; i += kLineFloats) __builtin_prefetch(row + i, 1, 2);
      __builtin_prefetch(row + rows - 1, 1, 2);
    }
  }

  // Adds moments of the form [row][width of a column].
  void add(const Microkernels& kernels, const float* moments, int64_t width) const {
    kernels.add_transposed(moments, width, rows, outputs, first, output_stride);
  }
};

}  // namespace fisherprune::cpu::grad_moments
