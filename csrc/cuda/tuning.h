// Tuning constants of the CUDA kernels. Any value is correct; these aim at sm_90.
#pragma once

#include <cstdint>

namespace fisherprune {

// A block's tile of the gradient: warps side by side, and 16 x 8 products of a warp.
template <int warps_m_, int warps_n_, int products_m_, int products_n_, int slabs_,
          int stages_, int blocks_, int exact_blocks_>
struct Tile {
  static constexpr int warps_m = warps_m_, warps_n = warps_n_;
  static constexpr int products_m = products_m_, products_n = products_n_;
  static constexpr int rows = warps_m * products_m * 16;    // output channels
  static constexpr int columns = warps_n * products_n * 8;  // of the patch
  static constexpr int threads = 32 * warps_m * warps_n;
  static constexpr int slabs = slabs_;    // of 16 positions between two barriers
  static constexpr int stages = stages_;  // of the pipeline from global memory
  static constexpr int blocks = blocks_;  // resident on a multiprocessor
  static constexpr int exact_blocks = exact_blocks_;  // the same to float32 precision
};

using SmallTile = Tile<2, 2, 1, 2, 2, 3, 4, 4>;   // 32 x 32: depthwise, first layers
using SquareTile = Tile<2, 2, 2, 4, 2, 3, 3, 2>;  // 64 x 64
using TallTile = Tile<4, 3, 2, 4, 1, 4, 1, 0>;    // 128 x 96: fewest gathers a product

template <class Tile, bool exact>
constexpr int resident_blocks() {
  return exact ? Tile::exact_blocks : Tile::blocks;
}

// Cost of a padded output relative to the tall tile, for the choice among the three.
constexpr double SMALL_COST = 2.0, SQUARE_COST = 1.15, TALL_COST = 1.0;

// Per-sample moments added in registers before they are added to memory: short enough
// that the rounding errors of 40,000 samples stay near those of a few hundred.
constexpr int FLUSH_GROUPS = 256;

// Samples are split over blocks until the multiprocessors are this full.
constexpr double FULL_ENOUGH = 0.9;
constexpr int MOST_WAVES = 4;
constexpr int LEAST_SLABS = 16;  // of work for a block

// global_topk: scores a block takes at a time, and the selections that share a pass.
constexpr int TOPK_THREADS = 256;
constexpr int TOPK_CHUNK = 8192;
constexpr int TOPK_BLOCKS = 4;  // resident on a multiprocessor
constexpr int TOPK_KEEPS = 6;   // 6 histograms of 2048 counts fill 48 KiB
constexpr int SHARED_DIGIT_BITS = 13;

}  // namespace fisherprune
