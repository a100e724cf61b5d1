// Tuning constants of the CUDA kernels. Any value is correct; these aim at sm_90.
#pragma once

#include <cstdint>

namespace fisherprune {

// A block's tile of the gradient: warps side by side, and 16 x 8 products of a warp.
template <int warps_m_, int warps_n_, int products_m_, int products_n_, int stages_,
          int blocks_>
struct TileShape {
  static constexpr int warps_m = warps_m_, warps_n = warps_n_;
  static constexpr int products_m = products_m_, products_n = products_n_;
  static constexpr int rows = warps_m * products_m * 16;    // output channels
  static constexpr int columns = warps_n * products_n * 8;  // of the patch
  static constexpr int threads = 32 * warps_m * warps_n;
  static constexpr int stages = stages_;  // of the pipeline from global memory
  static constexpr int blocks = blocks_;  // resident on a multiprocessor
};

// How operands come to the products.
enum class Path { gathered, window, dense };

// Of patches that are gathered.
template <class Shape, int slabs_, int exact_blocks_>
struct Tile : Shape {
  static constexpr Path path = Path::gathered;
  static constexpr int slabs = slabs_;  // of 16 positions between two barriers
  static constexpr int exact_blocks = exact_blocks_;  // resident, to float32 precision
};

using SmallTile = Tile<TileShape<2, 2, 1, 2, 3, 4>, 2, 4>;   // 32 x 32: first layers
using SquareTile = Tile<TileShape<2, 2, 2, 4, 3, 3>, 2, 2>;  // 64 x 64
using TallTile = Tile<TileShape<4, 3, 2, 4, 4, 1>, 1, 0>;    // 128 x 96

// Of convolutions whose images lie in shared memory. The 64 x 32 outputs of a warp fill
// the registers, and take the fewest reads a product.
template <class Shape>
struct ImageTile : Shape {
  static constexpr Path path = Path::window;
  static constexpr int exact_blocks = 0;
};

using WindowTile = ImageTile<TileShape<2, 4, 4, 4, 4, 1>>;      // 128 x 128
using SlimWindowTile = ImageTile<TileShape<1, 4, 4, 4, 4, 2>>;  // 64 x 128

// Of 16-bit operands without taps, whose products are exact.
template <class Shape>
struct RowsTile : Shape {
  static constexpr Path path = Path::dense;
  static constexpr int exact_blocks = Shape::blocks;
};

using DenseTile = RowsTile<TileShape<2, 4, 4, 4, 4, 1>>;  // 128 x 128

template <class Tile, bool exact>
constexpr int resident_blocks() {
  return exact ? Tile::exact_blocks : Tile::blocks;
}

// Cost of a padded output relative to the tall tile, for the choice among them.
constexpr double SMALL_COST = 2.0, SQUARE_COST = 1.15, TALL_COST = 1.0;
constexpr double SLIM_WINDOW_COST = 0.55, WINDOW_COST = 0.5, DENSE_COST = 0.25;

// Of shared memory, that the device keeps of each block.
constexpr int RESERVED_BYTES = 1 << 10;

// Per-sample moments added in registers before they are added to memory: short enough
// that the rounding errors of 40,000 samples stay near those of a few hundred.
constexpr int FLUSH_GROUPS = 256;

// Samples are split over blocks. A block of its own costs as much as some slabs of 16
// positions: its pipeline is filled, its sums go to memory and are read again.
constexpr int BLOCK_SLABS = 24;
constexpr int MOST_WAVES = 4;
constexpr int LEAST_SLABS = 16;  // of work for a block

// Weights of a layer from which on its moments are taken as two products: each has a
// block for a tile of weights, and of fewer there would be idle multiprocessors.
constexpr int64_t PRODUCTS_LEAST = 1 << 18;

// global_topk: scores a block takes at a time, and the selections that share a pass.
constexpr int TOPK_THREADS = 256;
constexpr int TOPK_CHUNK = 8192;
constexpr int TOPK_BLOCKS = 4;  // resident on a multiprocessor
constexpr int TOPK_KEEPS = 6;   // 6 histograms of 2048 counts fill 48 KiB
constexpr int SHARED_DIGIT_BITS = 13;

}  // namespace fisherprune
