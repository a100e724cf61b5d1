// grad_moments from its contract to launches: which tile, how many splits, which order
// of loads. Free of torch, so that tests run it as it is.
#pragma once

#include <algorithm>

#include "../check.h"
#include "grad_moments_kernel.cuh"

namespace fisherprune {

enum class TileKind { small, square, tall };

struct GradMomentsPlan {
  TileKind tile;
  int splits;         // of the samples
  int64_t workspace;  // floats
};

inline int64_t tiles_across(int64_t size, int64_t tile) {
  return (size + tile - 1) / tile;
}

template <class Tile>
int64_t tiles_of(const ConvShape& s) {
  return s.groups * tiles_across(s.group_outputs(), Tile::rows) *
         tiles_across(s.patch(), Tile::columns);
}

template <class Tile>
double padded_cost(const ConvShape& s, double cost) {
  return cost * static_cast<double>(tiles_of<Tile>(s) * Tile::rows * Tile::columns);
}

// To float32 precision a product needs so many registers that the tall tile is out.
inline TileKind choose_tile(const ConvShape& s, bool exact) {
  const double small = padded_cost<SmallTile>(s, SMALL_COST);
  const double square = padded_cost<SquareTile>(s, SQUARE_COST);
  const double tall = padded_cost<TallTile>(s, TALL_COST);
  if (small < square && (exact || small < tall)) return TileKind::small;
  return exact || square < tall ? TileKind::square : TileKind::tall;
}

// The fewest splits that leave hardly any of the `slots` for blocks idle in the last
// wave.
template <class Tile>
int choose_splits(const ConvShape& s, int64_t slots) {
  const int64_t tiles = tiles_of<Tile>(s);
  const int64_t slabs = s.samples * tiles_across(s.positions(), SLAB);
  const int64_t most = std::min({tiles_across(s.samples, s.group_size),
                                 MOST_WAVES * slots / tiles, slabs / LEAST_SLABS});
  int best = 1;
  double fullest = 0;
  for (int splits = 1; splits <= std::max<int64_t>(most, 1); ++splits) {
    const int64_t blocks = tiles * splits;
    const double full =
        static_cast<double>(blocks) / (tiles_across(blocks, slots) * slots);
    if (full > fullest) {
      fullest = full;
      best = splits;
    }
    if (full >= FULL_ENOUGH) break;
  }
  return best;
}

template <bool exact, class Action>
auto with_tile(TileKind kind, Action action) {
  if (kind == TileKind::small) return action(SmallTile{});
  if constexpr (!exact)
    if (kind == TileKind::tall) return action(TallTile{});
  return action(SquareTile{});
}

template <bool exact>
GradMomentsPlan plan_with_tile(const ConvShape& s, TileKind kind, int multiprocessors) {
  const int splits = with_tile<exact>(kind, [&](auto tile) {
    using Tile = decltype(tile);
    return choose_splits<Tile>(s, multiprocessors * resident_blocks<Tile, exact>());
  });
  return {kind, splits, splits > 1 ? 2 * splits * s.outputs * s.patch() : 0};
}

inline GradMomentsPlan plan_grad_moments(const ConvShape& s, bool allow_tf32,
                                         int multiprocessors) {
  const TileKind kind = choose_tile(s, !allow_tf32);
  return allow_tf32 ? plan_with_tile<false>(s, kind, multiprocessors)
                    : plan_with_tile<true>(s, kind, multiprocessors);
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

// Positions of a row one after the other, each row at a multiple of 16 bytes.
inline bool rows_are_vectors(const View4& v, int64_t height, int64_t width) {
  return (width == 1 || v.stride[3] == 1) && (height == 1 || v.stride[2] == width) &&
         v.stride[0] % 4 == 0 && v.stride[1] % 4 == 0 &&
         reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
}

inline bool both_float32(const GradMoments& m) {
  return m.input.dtype == Dtype::float32 && m.grad.dtype == Dtype::float32;
}

inline Order choose_order(const GradMoments& m, const View4& v, bool plain,
                          int64_t step) {
  const ConvShape& s = m.shape;
  if (both_float32(m) && plain && s.positions() > SLAB / 2 &&
      rows_are_vectors(v, s.out_height, s.out_width))
    return Order::vectors;
  const int64_t next = s.out_width > 1 ? v.stride[3] * step : v.stride[2] * step;
  return s.positions() == 1 || v.stride[1] < next ? Order::rows : Order::positions;
}

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

inline Operand operand_of(const View4& v, Order order, int64_t height, int64_t width) {
  Operand op{};
  op.data = static_cast<const char*>(v.data);
  op.dtype = v.dtype;
  op.order = order;
  op.sample_stride = v.stride[0] * size_of(v.dtype);
  op.stride_h = v.stride[2] * size_of(v.dtype);
  op.stride_w = v.stride[3] * size_of(v.dtype);
  op.height = static_cast<int>(height);
  op.width = static_cast<int>(width);
  op.step_h = op.step_w = 1;
  return op;
}

inline Operand grad_operand(const GradMoments& m) {
  return operand_of(m.grad, choose_order(m, m.grad, true, 1), m.shape.out_height,
                    m.shape.out_width);
}

inline Operand input_operand(const GradMoments& m) {
  const ConvShape& s = m.shape;
  const bool plain = s.kernel_h == 1 && s.kernel_w == 1 && s.stride_h == 1 &&
                     s.stride_w == 1 && s.pad_h == 0 && s.pad_w == 0;
  const int64_t step = s.out_width > 1 ? s.stride_w : s.stride_h;
  Operand op =
      operand_of(m.input, choose_order(m, m.input, plain, step), s.height, s.width);
  op.step_h = static_cast<int>(s.stride_h);
  op.step_w = static_cast<int>(s.stride_w);
  op.pad_h = static_cast<int>(s.pad_h);
  op.pad_w = static_cast<int>(s.pad_w);
  return op;
}

template <class Tile>
GradMomentsTask task_of(const GradMoments& m, int splits, float* workspace) {
  const ConvShape& s = m.shape;
  GradMomentsTask task{};
  task.grad = grad_operand(m);
  task.input = input_operand(m);
  task.grad_channel = m.grad.stride[1] * size_of(m.grad.dtype);
  task.input_channel = m.input.stride[1] * size_of(m.input.dtype);
  task.width_divider = Divider(static_cast<uint32_t>(s.out_width));
  task.out_width = static_cast<int>(s.out_width);
  task.positions = static_cast<int>(s.positions());
  task.rows = static_cast<int>(s.group_outputs());
  task.columns = static_cast<int>(s.patch());
  task.kernel_h = static_cast<int>(s.kernel_h);
  task.kernel_w = static_cast<int>(s.kernel_w);
  task.dilation_h = static_cast<int>(s.dilation_h);
  task.dilation_w = static_cast<int>(s.dilation_w);
  task.row_tiles = static_cast<int>(tiles_across(s.group_outputs(), Tile::rows));
  task.column_tiles = static_cast<int>(tiles_across(s.patch(), Tile::columns));
  task.samples = static_cast<int>(s.samples);
  task.group_size = static_cast<int>(std::min(s.group_size, s.samples));
  const int64_t size = s.outputs * s.patch();
  task.fresh = splits > 1;
  task.sum = task.fresh ? workspace : m.sum;
  task.sum_sq = task.fresh ? workspace + size : m.sum_sq;
  task.split_stride = 2 * size;
  return task;
}

template <class Tile, bool exact>
void launch_tile(const GradMoments& m, int splits, float* workspace, Stream stream) {
  const auto kernel = both_float32(m) ? grad_moments_kernel<Tile, exact, true>
                                      : grad_moments_kernel<Tile, exact, false>;
  const dim3 grid(static_cast<unsigned>(tiles_of<Tile>(m.shape)), splits);
  launch(kernel, grid, Tile::threads, sizeof(Shared<Tile>), stream,
         task_of<Tile>(m, splits, workspace));
}

template <bool exact>
void launch_planned(const GradMoments& m, const GradMomentsPlan& plan, float* workspace,
                    Stream stream) {
  with_tile<exact>(plan.tile, [&](auto tile) {
    launch_tile<decltype(tile), exact>(m, plan.splits, workspace, stream);
  });
}

// Enqueues the op on `stream`; `workspace` holds plan.workspace floats.
inline void run_grad_moments(const GradMoments& m, const GradMomentsPlan& plan,
                             bool allow_tf32, float* workspace, Stream stream) {
  if (allow_tf32)
    launch_planned<false>(m, plan, workspace, stream);
  else
    launch_planned<true>(m, plan, workspace, stream);
  if (plan.splits == 1) return;
  const int64_t size = m.shape.outputs * m.shape.patch();
  const dim3 grid(static_cast<unsigned>(tiles_across(size, COMBINE_THREADS)));
  launch(combine_moments, grid, COMBINE_THREADS, 0, stream,
         static_cast<const float*>(workspace), size, plan.splits, m.sum, m.sum_sq);
}

// Whether there is anything to add.
inline bool has_work(const ConvShape& s) {
  return s.samples > 0 && s.positions() > 0 && s.outputs > 0 && s.patch() > 0;
}

}  // namespace fisherprune
