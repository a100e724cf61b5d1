// grad_moments of layers without taps, whose operands have one type and neighbouring
// channels or positions: linear layers over sequences, and 1 x 1 convolutions, with a
// stride too; of 16 bits, or of float32 in TF32. Nothing is gathered: a stage holds
// rows of positions, one for each channel, or rows of channels, which the products read
// transposed.
//
// A stage of the pipeline holds 64 positions of 16 bits, or 32 of float32: a unit of
// one sample, or units of 32 or 16 positions where samples are small. Products of
// 16-bit numbers are exact, but tensor cores cut off low bits of their sums. So for
// float32 precision they add 16 positions only, and the rest is added outside of them.
//
// Everything else, the order of the additions too, is as in the other kernels.
#pragma once

#include "grad_moments/cuda/dense_load.cuh"

namespace fisherprune::cuda::grad_moments {

// Where a lane finds its row of four matrices in a stage, in bytes: two blocks of
// positions by two blocks of channels, in the order of a product's operand. In pixels
// of float32 it reads words.
template <class Shape, int channels>
__device__ inline int dense_place(int channel, bool positions_first) {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
  if constexpr (!Shape::planes && Shape::value == WORD)
    return lane % 4 * Shape::pitch(channels) + (channel + lane / 4) * WORD;
  const int positions = positions_first ? matrix % 2 : matrix / 2;
  channel += (positions_first ? matrix / 2 : matrix % 2) * 8;
  if constexpr (Shape::planes) return grad_place(channel + lane % 8, positions) * WORD;
  return (lane % 8 + positions * 8) * Shape::pitch(channels) + channel * Shape::value;
}

// The same, from position `t` of the stage on.
template <class Shape, int channels>
__device__ inline SharedAddress dense_from(SharedAddress place, int t) {
  if constexpr (Shape::planes) return flipped(place, t * Shape::value);
  return place + t * Shape::pitch(channels);
}

// Reads a product's operand, or those of two products, from `channel` on.
template <class Shape, int channels, bool positions_first>
__device__ inline void read_dense(uint32_t (&words)[4], SharedAddress from,
                                  int channel) {
  if constexpr (Shape::planes) {
    read_matrices(words, from + channel * STAGE_BYTES);
  } else if constexpr (Shape::value < WORD) {
    read_transposed(words, from + channel * Shape::value);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int positions = positions_first ? e % 2 : e / 2;
      const int block = positions_first ? e / 2 : e % 2;
      words[e] = __float_as_uint(load_shared(from + (channel + block * 8) * WORD +
                                             positions * 4 * Shape::pitch(channels)));
    }
  }
  round_operand<Shape::dtype>(words);
}

// Multiplies the positions of a product, which begin at `grad` and `input`. `first`: of
// the group.
template <class Tile, class Shape, bool exact, bool first>
__device__ inline void multiply_dense(Moments<Tile>& moments, SharedAddress grad,
                                      SharedAddress input) {
  static_assert(!exact || Shape::value < WORD, "float32 is rounded to TF32");
  uint32_t a[Tile::products_m][4];
#pragma unroll
  for (int i = 0; i < Tile::products_m; ++i)
    read_dense<Shape, Tile::rows, false>(a[i], grad, i * 16);
#pragma unroll
  for (int j = 0; j < Tile::products_n; j += 2) {
    uint32_t words[4];
    read_dense<Shape, Tile::columns, true>(words, input, j * 8);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const uint32_t b[2] = {words[2 * side], words[2 * side + 1]};
#pragma unroll
      for (int i = 0; i < Tile::products_m; ++i) {
        float (&group)[4] = moments.group[i][j + side];
        if constexpr (first || !exact) {
          multiply_into<first, Shape::dtype>(group, a[i], b);
        } else {
          float c[4];
          multiply_into<true, Shape::dtype>(c, a[i], b);
#pragma unroll
          for (int e = 0; e < 4; ++e) group[e] += c[e];
        }
      }
    }
  }
}

template <class Tile, Layout layout, Dtype dtype, bool exact>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    grad_moments_dense_kernel(const DenseTask task) {
  using Shape = DenseShape<layout, dtype>;
  constexpr int grad_stage = Shape::stage_bytes(Tile::rows);
  constexpr int input_stage = Shape::stage_bytes(Tile::columns);
  const GradMomentsTask& m = task.moments;
  const TilePlace tile = tile_place(m, Tile::rows, Tile::columns);
  const SampleRange range = sample_range(m);
  const int64_t row = static_cast<int64_t>(tile.conv_group) * m.rows + tile.row;
  const int64_t column =
      static_cast<int64_t>(tile.conv_group) * m.columns + tile.column;
  DenseCopies<Tile, Shape, Tile::rows> grads(m.grad, m.grad_channel, row,
                                             m.rows - tile.row, range.first);
  DenseCopies<Tile, Shape, Tile::columns> inputs(m.input, m.input_channel, column,
                                                 m.columns - tile.column, range.first);

  const SharedAddress grad_address = shared_address(dynamic_shared());
  const SharedAddress input_address = grad_address + Tile::stages * grad_stage;
  const int warp = threadIdx.x / 32;
  const int my_grad = kept(dense_place<Shape, Tile::rows>(
      warp / Tile::warps_n * (Tile::products_m * 16), false));
  const int my_input = dense_place<Shape, Tile::columns>(
      warp % Tile::warps_n * (Tile::products_n * 8), true);  // kept, it would spill

  Cursor loaded{range.first, 0}, cursor = loaded;
  const int unit = 1 << task.unit_bits, units = Shape::stage >> task.unit_bits;
  Moments<Tile> moments{};
  GroupCount count(m.fresh);
  run_pipeline<Tile, Shape::stage / Shape::depth, 0>(
      moments, m, count, range, cursor,
      [&](int stage, int) {
        if (loaded.sample >= range.end) return;
        grads.start(task, m.grad, task.grad, m.grad_channel, task.grad_vectors, loaded,
                    range.end, grad_address + stage * grad_stage);
        inputs.start(task, m.input, task.input, m.input_channel, task.input_vectors,
                     loaded, range.end, input_address + stage * input_stage);
        loaded.at += unit;
        if (loaded.at < m.positions) return;
        loaded = {loaded.sample + units, 0};
        grads.from += units * m.grad.sample_stride;
        inputs.from += units * m.input.sample_stride;
      },
      [](int) {},
      [&](int stage) {
        const SharedAddress grad = grad_address + my_grad + stage * grad_stage;
        const SharedAddress input = input_address + my_input + stage * input_stage;
#pragma unroll 1
        for (int t = 0; t < Shape::stage && cursor.sample < range.end;
             t += Shape::depth) {
          __syncwarp();  // a product takes the whole warp; loads may have split it
          const SharedAddress from = dense_from<Shape, Tile::rows>(grad, t);
          const SharedAddress with = dense_from<Shape, Tile::columns>(input, t);
          if (count.samples == 0 && cursor.at == 0)
            multiply_dense<Tile, Shape, exact, true>(moments, from, with);
          else
            multiply_dense<Tile, Shape, exact, false>(moments, from, with);
          const int sample = cursor.sample;
          cursor.advance(m.positions, Shape::depth);
          if (cursor.sample == sample) continue;
          close_sample<Tile>(moments, m, count, cursor.sample == range.end);
          // The rest of this unit lies behind its sample: there is nothing to add.
          t += unit - Shape::depth - task.place_in_unit(t);
        }
      });
}

}  // namespace fisherprune::cuda::grad_moments
