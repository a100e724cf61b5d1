// Tuning constants of grad_moments on CUDA; these aim at sm_90. Any values within the
// bounds that are asserted, here and where tiles are used, give right results.
#pragma once

#include <cstdint>

namespace fisherprune::cuda::grad_moments {

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
  static_assert(threads <= 1024 && blocks >= 1);
  static_assert(stages >= 2, "a stage is copied while another one is multiplied");
};

// How operands get to the products.
enum class Path { gathered, window, taps, lanes, dense, wgmma };

// A tile for patches that are gathered.
template <class Shape, int slabs_, int exact_blocks_>
struct Tile : Shape {
  static constexpr Path path = Path::gathered;
  static constexpr int slabs = slabs_;  // of 16 positions between two barriers
  static constexpr int exact_blocks = exact_blocks_;  // resident, to float32 precision
  static_assert(slabs >= 1);
};

using SmallTile = Tile<TileShape<2, 2, 1, 2, 3, 4>, 2, 4>;   // 32 x 32: first layers
using SquareTile = Tile<TileShape<2, 2, 2, 4, 3, 3>, 2, 2>;  // 64 x 64
using TallTile = Tile<TileShape<4, 3, 2, 4, 4, 1>, 1, 0>;    // 128 x 96

// A tile for convolutions whose images lie in shared memory. A warp's 64 x 32 outputs
// fill the registers, and need the fewest reads for a product.
template <class Shape>
struct ImageTile : Shape {
  static constexpr Path path = Path::window;
  static constexpr int exact_blocks = 0;
  static_assert(Shape::products_m % 2 == 0, "products of small images come in pairs");
  static_assert(Shape::stages >= 3,
                "a stage of 16 bits is widened before it is multiplied");
};

using WindowTile = ImageTile<TileShape<2, 4, 4, 4, 4, 1>>;      // 128 x 128
using SlimWindowTile = ImageTile<TileShape<1, 4, 4, 4, 4, 2>>;  // 64 x 128

// A tile for 3 x 3 convolutions that keep the image's size: a product's columns are
// channels, and each product in a row has a tap of its own.
template <class Shape>
struct TapsTileOf : Shape {
  static constexpr Path path = Path::taps;
  static constexpr int exact_blocks = 0;
  static_assert(Shape::products_n == 9, "a product for each tap");
};

using TapsTile = TapsTileOf<TileShape<4, 2, 2, 9, 4, 1>>;      // 128 x 144
using SlimTapsTile = TapsTileOf<TileShape<2, 2, 2, 9, 4, 2>>;  // 64 x 144

// The same for images of any width, with a stride too: each lane finds the places of
// its positions.
template <class Shape>
struct LanesTileOf : Shape {
  static constexpr Path path = Path::lanes;
  static constexpr int exact_blocks = 0;
  static_assert(Shape::products_n == 9, "a product for each tap");
};

using LanesTile = LanesTileOf<TileShape<4, 2, 2, 9, 4, 1>>;      // 128 x 144
using SlimLanesTile = LanesTileOf<TileShape<2, 2, 2, 9, 4, 2>>;  // 64 x 144

// A tile for operands without taps, with their channels or positions side by side.
// Products of 16 bits are exact.
template <class Shape>
struct RowsTile : Shape {
  static constexpr Path path = Path::dense;
  static constexpr int exact_blocks = Shape::blocks;
  static_assert(Shape::products_n % 2 == 0,
                "the input is read for two products at once");
};

using DenseTile = RowsTile<TileShape<2, 4, 4, 4, 4, 1>>;  // 128 x 128

// A tile of products of warpgroups, for the same convolutions as those of taps. Each
// warpgroup has 64 x 144 outputs: all nine taps of 16 channels.
template <class Shape>
struct WgmmaTileOf : Shape {
  static constexpr Path path = Path::wgmma;
  static constexpr int exact_blocks = 0;
  static_assert(Shape::warps_m % 4 == 0 && Shape::products_m == 1 &&
                    Shape::products_n == 18,
                "a warpgroup's product has 64 x 144 outputs");
};

using WgmmaTile = WgmmaTileOf<TileShape<8, 1, 1, 18, 8, 1>>;      // 128 x 144
using SlimWgmmaTile = WgmmaTileOf<TileShape<4, 2, 1, 18, 8, 1>>;  // 64 x 288

template <class Tile, bool exact>
constexpr int resident_blocks() {
  return exact ? Tile::exact_blocks : Tile::blocks;
}

// Blocks that share what they copy of the gradient, at most; a power of two.
constexpr int WGMMA_CLUSTER = 4;
static_assert(WGMMA_CLUSTER >= 1 && (WGMMA_CLUSTER & (WGMMA_CLUSTER - 1)) == 0);

// The cost of an output of a padded tile, relative to the tall one, to choose a tile.
constexpr double SMALL_COST = 2.0, SQUARE_COST = 1.15, TALL_COST = 1.0;
constexpr double SLIM_WINDOW_COST = 0.55, WINDOW_COST = 0.5;
constexpr double SLIM_TAPS_COST = 0.5, TAPS_COST = 0.45;
constexpr double DENSE_COST = 0.25, DENSE_TF32_COST = 0.5;
constexpr double SLIM_LANES_COST = 0.55, LANES_COST = 0.5;
constexpr double STRIDED_PLANES_COST = 0.25;  // beyond that of lanes
constexpr double PIXEL_COST = 48;             // of a value that is copied first
constexpr double SLIM_WGMMA_COST = 0.35, WGMMA_COST = 0.3;

// Bytes of each block's shared memory that the device keeps for itself.
constexpr int RESERVED_BYTES = 1 << 10;

// Groups of samples whose moments are added in registers before they are added to
// memory: few enough that the rounding errors of 40,000 samples stay near those of a
// few hundred. Registers are flushed between two stages of the pipeline, and the sums
// of an open group would be lost: so this many groups must fill whole stages, whatever
// a group's size. They do where the number is a multiple of the samples that a stage
// can hold; run_pipeline asserts that each kernel's stages hold a divisor of
// STAGE_SAMPLES.
constexpr int FLUSH_GROUPS = 256;
constexpr int STAGE_SAMPLES = 8;
static_assert(FLUSH_GROUPS >= 1 && FLUSH_GROUPS % STAGE_SAMPLES == 0,
              "a flush must not meet an open group");

// Samples are split over blocks. One more block costs as much as BLOCK_SLABS slabs of
// 16 positions: its pipeline must be filled, its sums go to memory and are read again.
constexpr int BLOCK_SLABS = 24;
constexpr int MOST_WAVES = 4;
constexpr int LEAST_SLABS = 16;  // of work for a block
static_assert(BLOCK_SLABS >= 0 && MOST_WAVES >= 1 && LEAST_SLABS >= 1);

// The least weights of a layer whose moments are computed as two products. A product
// has a block for each tile of weights: with fewer tiles, multiprocessors would be
// idle.
constexpr int64_t PRODUCTS_LEAST = 1 << 18;

}  // namespace fisherprune::cuda::grad_moments
