// Plans of grad_moments: which kernel and tile, and how the samples are split.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "common/check.h"
#include "grad_moments/cuda/pixels.cuh"
#include "grad_moments/cuda/products.cuh"

namespace fisherprune::cuda::grad_moments {

enum class TileKind {
  small,
  square,
  tall,
  window,
  slim_window,
  dense,
  taps,
  slim_taps,
  wgmma,
  slim_wgmma,
  lanes,
  slim_lanes
};

// How the samples are divided among the blocks of a tile.
struct Shares {
  int splits = 1;  // blocks
  int parts = 1;   // of a group, each for a block; 1: a block has whole groups

  // Floats for each weight.
  int64_t workspace() const { return parts > 1 ? splits : splits > 1 ? 2 * splits : 0; }
};

struct GradMomentsPlan {
  TileKind tile;
  Shares shares;
  int64_t workspace;      // floats
  bool products = false;  // two products, see products.cuh
  bool pixels = false;    // of copies, see pixels.cuh
};

// A tile, and what it costs for each output position.
struct Choice {
  TileKind tile;
  double cost;
};

template <class Tile>
int64_t tiles_of(const ConvShape& s) {
  return s.groups * ceil_div(s.group_outputs(), Tile::rows) *
         ceil_div(s.patch(), Tile::columns);
}

template <class Tile>
double padded_cost(const ConvShape& s, double cost) {
  return cost * static_cast<double>(tiles_of<Tile>(s) * Tile::rows * Tile::columns);
}

// Whether the dense kernel can take the op: float32 in TF32 alone. What `products`
// squares is float32, whatever the operands are.
inline bool may_be_dense(const GradMoments& m, bool exact, bool products) {
  return dense_suits(m) && (m.input.dtype == Dtype::float32 ? !exact : !products);
}

// In float32 precision a product needs many registers: there are no large tiles then.
// `wgmma`: products of warpgroups are allowed.
inline Choice choose_tile(const GradMoments& m, bool exact, bool products, bool wgmma) {
  const ConvShape& s = m.shape;
  Choice best{TileKind::small, padded_cost<SmallTile>(s, SMALL_COST)};
  // Of equal costs the later one is taken.
  const auto consider = [&](TileKind kind, double cost) {
    if (cost <= best.cost) best = {kind, cost};
  };
  consider(TileKind::square, padded_cost<SquareTile>(s, SQUARE_COST));
  if (may_be_dense(m, exact, products))
    consider(TileKind::dense,
             padded_cost<DenseTile>(s, both_float32(m) ? DENSE_TF32_COST : DENSE_COST));
  if (exact) return best;
  consider(TileKind::tall, padded_cost<TallTile>(s, TALL_COST));
  const double of_lanes = s.stride_h == 2 && are_planes(m) ? STRIDED_PLANES_COST : 0;
  if (lanes_suit<SlimLanesTile>(m))
    consider(TileKind::slim_lanes,
             padded_cost<SlimLanesTile>(s, SLIM_LANES_COST + of_lanes));
  if (lanes_suit<LanesTile>(m))
    consider(TileKind::lanes, padded_cost<LanesTile>(s, LANES_COST + of_lanes));
  if (find_window<SlimWindowTile>(m))
    consider(TileKind::slim_window, padded_cost<SlimWindowTile>(s, SLIM_WINDOW_COST));
  if (find_window<WindowTile>(m))
    consider(TileKind::window, padded_cost<WindowTile>(s, WINDOW_COST));
  if (taps_suit<SlimTapsTile>(m))
    consider(TileKind::slim_taps, padded_cost<SlimTapsTile>(s, SLIM_TAPS_COST));
  if (taps_suit<TapsTile>(m))
    consider(TileKind::taps, padded_cost<TapsTile>(s, TAPS_COST));
  if (wgmma && wgmma_suits(m)) {
    consider(TileKind::slim_wgmma, padded_cost<SlimWgmmaTile>(s, SLIM_WGMMA_COST));
    consider(TileKind::wgmma, padded_cost<WgmmaTile>(s, WGMMA_COST));
  }
  return best;
}

// The tile for copies of the operands, and the cost of these.
inline Choice choose_copies(const GradMoments& m, bool exact) {
  if (!may_become_pixels(m)) return {TileKind::small, HUGE_VAL};
  Choice best = choose_tile(as_pixels(m, nullptr), exact, false, false);
  const int64_t positions = m.shape.samples * m.shape.positions();
  best.cost += PIXEL_COST * static_cast<double>(pixel_values(m.shape)) /
               static_cast<double>(positions);
  return best;
}

// The shares that take the shortest time, counted in slabs of a slot for a block: whole
// groups for each block, or parts of groups where there are few groups. Of all shares
// within 2 % of that time, those of the fewest splits: the count is no more exact, and
// each split takes two floats of memory for each weight.
template <class Tile>
Shares choose_shares(const ConvShape& s, int64_t slots) {
  const int64_t tiles = tiles_of<Tile>(s), slabs = ceil_div(s.positions(), SLAB);
  const int64_t group_size = std::min(s.group_size, s.samples);
  const int64_t groups = ceil_div(s.samples, group_size);
  const int64_t most =
      std::min(MOST_WAVES * slots / tiles, s.samples * slabs / LEAST_SLABS);
  const auto time_of = [&](int64_t splits, int64_t samples) {
    return ceil_div(tiles * splits, slots) * (samples * slabs + BLOCK_SLABS);
  };
  // Those of more splits come later.
  const auto for_each = [&](auto consider) {
    consider(Shares{}, time_of(1, s.samples));
    for (int64_t splits = 2; splits <= std::min(groups, most); ++splits)
      consider(Shares{static_cast<int>(splits), 1},
               time_of(splits, ceil_div(groups, splits) * group_size));
    for (int64_t parts = 2; parts <= std::min(group_size, most / groups); ++parts)
      consider(Shares{static_cast<int>(groups * parts), static_cast<int>(parts)},
               time_of(groups * parts, ceil_div(group_size, parts)));
  };
  int64_t shortest = std::numeric_limits<int64_t>::max();
  for_each([&](Shares, int64_t time) { shortest = std::min(shortest, time); });
  std::optional<Shares> fewest;
  for_each([&](Shares shares, int64_t time) {
    if (!fewest && time - shortest <= shortest / 50) fewest = shares;
  });
  return fewest.value();
}

template <bool exact, class Action>
auto with_tile(TileKind kind, Action action) {
  if (kind == TileKind::small) return action(SmallTile{});
  if (kind == TileKind::dense) return action(DenseTile{});
  if constexpr (!exact) {
    if (kind == TileKind::tall) return action(TallTile{});
    if (kind == TileKind::window) return action(WindowTile{});
    if (kind == TileKind::slim_window) return action(SlimWindowTile{});
    if (kind == TileKind::taps) return action(TapsTile{});
    if (kind == TileKind::slim_taps) return action(SlimTapsTile{});
    if (kind == TileKind::wgmma) return action(WgmmaTile{});
    if (kind == TileKind::slim_wgmma) return action(SlimWgmmaTile{});
    if (kind == TileKind::lanes) return action(LanesTile{});
    if (kind == TileKind::slim_lanes) return action(SlimLanesTile{});
  }
  return action(SquareTile{});
}

template <bool exact>
GradMomentsPlan plan_with_tile(const ConvShape& s, TileKind kind, int multiprocessors) {
  const Shares shares = with_tile<exact>(kind, [&](auto tile) {
    using Tile = decltype(tile);
    return choose_shares<Tile>(s, multiprocessors * resident_blocks<Tile, exact>());
  });
  return {kind, shares, shares.workspace() * s.outputs * s.patch(), false};
}

inline GradMomentsPlan plan_grad_moments(const GradMoments& m, bool allow_tf32,
                                         int multiprocessors, bool wgmma = false) {
  const bool products = are_products(m.shape);
  const GradMoments part = products ? samples_as_positions(m) : m;
  const Choice as_it_lies = choose_tile(part, !allow_tf32, products, wgmma);
  const Choice of_copies = choose_copies(m, !allow_tf32);
  const bool pixels = !products && of_copies.cost < as_it_lies.cost;
  const TileKind kind = pixels ? of_copies.tile : as_it_lies.tile;
  GradMomentsPlan plan = allow_tf32
                             ? plan_with_tile<false>(part.shape, kind, multiprocessors)
                             : plan_with_tile<true>(part.shape, kind, multiprocessors);
  plan.products = products;
  plan.pixels = pixels;
  if (products) plan.workspace += square_floats(m.shape);
  if (pixels) plan.workspace += pixel_floats(part.shape);
  return plan;
}

// The kernels count samples, and what lies within one, in 32 bits.
inline void check_extents(const ConvShape& s) {
  const auto below_limit = [](int64_t extent, const char* what) {
    const int64_t limit = int64_t{1} << 30;
    check(extent < limit, "grad_moments: on CUDA the ", what, " must be fewer than ",
          limit, ", got ", extent);
  };
  below_limit(s.samples, "samples");
  below_limit(s.height + 2 * s.pad_h, "rows of the padded image");
  below_limit(s.width + 2 * s.pad_w, "columns of the padded image");
  below_limit(s.positions(), "positions");
  below_limit(s.group_outputs(), "outputs of a convolution group");
  below_limit(s.patch(), "weights of an output");
  below_limit(tiles_of<SmallTile>(s), "tiles of the weight gradient");
}

}  // namespace fisherprune::cuda::grad_moments
