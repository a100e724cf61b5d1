// The kept weights in the order in which tasks use them.
#pragma once

#include <cstdint>
#include <vector>

#include "common/cpu/parallel.h"
#include "sparse_conv/contract.h"
#include "sparse_conv/cpu/kernels.h"
#include "sparse_conv/cpu/tile.h"

namespace fisherprune::cpu::sparse_conv {

// Taps by the output's channel and grid, and within them by the tile of channels that
// they read. Without values their weights are not set.
struct TapLists {
  int64_t grids, cuts;  // of an output channel; of the source's channels
  std::vector<Tap> taps;
  std::vector<int64_t> starts;

  int64_t index(int64_t channel, int64_t grid, int64_t cut) const {
    return (channel * grids + grid) * cuts + cut;
  }
  Taps at(int64_t channel, int64_t grid, int64_t cut) const {
    const int64_t i = index(channel, grid, cut);
    return {taps.data() + starts[i], starts[i + 1] - starts[i]};
  }
};

// For the output, in the order of the pattern: the source is the input.
TapLists forward_taps(const SparseConvShape& s, const Pattern& pattern,
                      const float* values, const Axis& y, const Axis& x, const Cut& cut,
                      const TileLayout& layout, const Parallel& parallel);

// For the gradient of the input: the source is that of the output.
TapLists backward_taps(const SparseConvShape& s, const Pattern& pattern,
                       const float* values, const Axis& y, const Axis& x,
                       const Cut& cut, const TileLayout& layout);

}  // namespace fisherprune::cpu::sparse_conv
