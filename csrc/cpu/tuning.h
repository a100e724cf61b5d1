// Tuning constants of the CPU kernels. None of them depends on the number of threads,
// so the order of the additions, and with it every bit of the result, does not either.
#pragma once

#include <cstdint>

namespace fisherprune::tuning {

// Rows of the patch and lanes of the outputs that one task keeps in its tile: twice
// 48 x 64 floats are 24 KiB, half of a first-level cache. 48 is a multiple of every
// micro-tile's rows but the 9 of depthwise convolutions.
constexpr int64_t kTileRows = 48;
constexpr int64_t kTileLanes = 64;

// The packed output gradient of one column of tiles is read once for every few rows of
// the patch: it must stay in the second-level cache.
constexpr int64_t kGradBytes = 1 << 20;

// All that is packed at a time. More samples in a block mean fewer additions to the
// accumulators in memory.
constexpr int64_t kPackBytes = 16 << 20;

// Positions added up in one register before they join the others: bounds the rounding
// error of long sums (groups of many samples, large images).
constexpr int64_t kRunPositions = 2048;

}  // namespace fisherprune::tuning
