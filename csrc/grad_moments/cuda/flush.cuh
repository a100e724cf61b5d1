// A block's sums on their way from registers to memory.
#pragma once

#include "grad_moments/cuda/task.cuh"
#include "grad_moments/cuda/tile.cuh"

namespace fisherprune::cuda::grad_moments {

// The place of a column's weight in the filter.
__device__ inline int weight_place(const GradMomentsTask& task, int column) {
  if (task.input.order != Order::rows) return column;
  const Weight weight = weight_of(task, column);
  return weight.channel * task.kernel_h * task.kernel_w + weight.tap;
}

// Adds a column of a thread's values to the sums that begin at `at`. It reads the whole
// column before it writes: the compiler moves no load across a store that might go to
// the same place, and each value would wait for memory.
template <class Tile>
__device__ inline void flush_column(const typename Moments<Tile>::Values& values, int j,
                                    int side, float* at, int64_t row_words, int rows,
                                    float scale, bool fresh) {
  float before[Tile::products_m][2];
#pragma unroll
  for (int i = 0; i < Tile::products_m; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      before[i][half] = !fresh && i * 16 + half * 8 < rows
                            ? at[(i * 16 + half * 8) * row_words]
                            : 0.f;
#pragma unroll
  for (int i = 0; i < Tile::products_m; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (i * 16 + half * 8 < rows)
        at[(i * 16 + half * 8) * row_words] =
            fmaf(values[i][j][half * 2 + side], scale, before[i][half]);
}

template <class Tile>
__device__ inline void flush_columns(const Moments<Tile>& moments,
                                     const GradMomentsTask& task, bool fresh) {
  const TilePlace tile = tile_place(task, Tile::rows, Tile::columns);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = tile.row + warp / Tile::warps_n * (Tile::products_m * 16) + lane / 4;
  const int column =
      tile.column + warp % Tile::warps_n * (Tile::products_n * 8) + lane % 4 * 2;
  const int64_t output = static_cast<int64_t>(tile.conv_group) * task.rows + row;
  const int64_t first = blockIdx.y * task.split_stride + output * task.columns;
  const float scale = 1.f / static_cast<float>(task.group_size);
#pragma unroll
  for (int j = 0; j < Tile::products_n; ++j)
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      if (column + j * 8 + side >= task.columns) continue;
      const int64_t at = first + weight_place(task, column + j * 8 + side);
      flush_column<Tile>(moments.sum, j, side, task.sum + at, task.columns,
                         task.rows - row, scale, fresh);
      if (task.sum_sq)
        flush_column<Tile>(moments.sum_sq, j, side, task.sum_sq + at, task.columns,
                           task.rows - row, scale * scale, fresh);
    }
}

// The same where the columns of a product are channels, and products in a row are taps,
// of eight or 16 channels. What a warp has of 8 rows and 8 channels goes through shared
// memory: there lie the sums of a row one after the other, as in memory. Again all is
// read before the first sum is written.
constexpr int TAPS = 9;

template <class Tile>
struct RowsOfTaps {
  static constexpr int blocks = Tile::products_n / TAPS;  // of eight channels
  static constexpr int row = TAPS * 8, floats = 8 * row;
  static constexpr bool full = Tile::path == Path::taps;  // all rows and columns exist
  static_assert(Tile::products_n % TAPS == 0);
  float* sorted;  // the warp's
  int64_t row_words;
  int rows, columns;  // that exist, of the warp's
  bool fresh;

  // Adds rows i * 16 + half * 8 and the following to sums that begin at `at`.
  __device__ void flush(const typename Moments<Tile>::Values& values, int i, int half,
                        int block, float* at, float scale) const {
    const int lane = threadIdx.x % 32;
    float* mine = sorted + lane / 4 * row + lane % 4 * 2 * TAPS;
    __syncwarp();
#pragma unroll
    for (int side = 0; side < 2; ++side)
#pragma unroll
      for (int tap = 0; tap < TAPS; ++tap)
        mine[side * TAPS + tap] = values[i][tap * blocks + block][half * 2 + side];
    __syncwarp();
#pragma unroll
    for (int next = 0; next < 8; next += 4) {
      const int of_rows = next + lane / 8, of_row = lane % 8;
      const int to_row = i * 16 + half * 8 + of_rows, to_column = block * row + of_row;
      // Of what lies 8 apart from there on.
      const int exist = full ? TAPS : to_row < rows ? (columns - to_column + 7) / 8 : 0;
      float* to = at + to_row * row_words + to_column;
      float before[TAPS];
#pragma unroll
      for (int k = 0; k < TAPS; ++k) before[k] = fresh || k >= exist ? 0.f : to[k * 8];
#pragma unroll
      for (int k = 0; k < TAPS; ++k)
        if (k < exist)
          to[k * 8] = fmaf(sorted[of_rows * row + of_row + k * 8], scale, before[k]);
    }
  }
};

// A warp's place in its tile, in warps. The four of a warpgroup lie one below another.
struct WarpPlace {
  int row, column;
};

template <class Tile>
__device__ inline WarpPlace warp_place() {
  const int warp = threadIdx.x / 32;
  if constexpr (Tile::path != Path::wgmma)
    return {warp / Tile::warps_n, warp % Tile::warps_n};
  const int group = warp / 4;
  return {group / Tile::warps_n * 4 + warp % 4, group % Tile::warps_n};
}

template <class Tile>
__device__ inline void flush_taps(const Moments<Tile>& moments,
                                  const GradMomentsTask& task, bool fresh) {
  using Rows = RowsOfTaps<Tile>;
  const TilePlace tile = tile_place(task, Tile::rows, Tile::columns);
  const WarpPlace warp = warp_place<Tile>();
  const int row = tile.row + warp.row * (Tile::products_m * 16);
  const int column = tile.column + warp.column * (Rows::blocks * Rows::row);
  const int64_t output = static_cast<int64_t>(tile.conv_group) * task.rows + row;
  const int64_t at = blockIdx.y * task.split_stride + output * task.columns + column;
  const float scale = 1.f / static_cast<float>(task.group_size);
  const int nth = threadIdx.x / 32;
  const Rows to{reinterpret_cast<float*>(dynamic_shared()) + nth * Rows::floats,
                task.columns, task.rows - row, task.columns - column, fresh};
#pragma unroll
  for (int i = 0; i < Tile::products_m; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int block = 0; block < Rows::blocks; ++block) {
        to.flush(moments.sum, i, half, block, task.sum + at, scale);
        if (task.sum_sq)
          to.flush(moments.sum_sq, i, half, block, task.sum_sq + at, scale * scale);
      }
}

// Adds the registers to this split's sums and clears them. It finds the tile's place
// again: if that were kept, the products would have fewer registers. It also clears the
// closed group, which nobody reads: so its registers are free for what is read here.
template <class Tile>
__device__ inline void flush(Moments<Tile>& moments, const GradMomentsTask& task,
                             bool fresh) {
  if constexpr (Tile::path == Path::taps || Tile::path == Path::lanes ||
                Tile::path == Path::wgmma)
    flush_taps<Tile>(moments, task, fresh);
  else
    flush_columns<Tile>(moments, task, fresh);
  for_each_value<Tile>([&](int i, int j, int e) {
    moments.group[i][j][e] = moments.sum[i][j][e] = moments.sum_sq[i][j][e] = 0.f;
  });
}

}  // namespace fisherprune::cuda::grad_moments
