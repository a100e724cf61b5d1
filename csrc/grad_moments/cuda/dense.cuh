// grad_moments of layers without taps, whose operands have one type and neighbouring
// channels: linear layers over sequences, and 1 x 1 convolutions of channels_last
// images; of 16 bits, or of float32 in TF32. Nothing is gathered: the positions of a
// stage lie in shared memory as rows of channels, and the products read them
// transposed.
//
// A stage of the pipeline holds 64 positions of 16 bits, or 32 of float32: a unit of
// one sample, or units of 32 or 16 positions where samples are small. Products of
// 16-bit numbers are exact, but tensor cores cut off low bits of their sums. So for
// float32 precision they add 16 positions only, and the rest is added outside of them.
//
// Everything else, the order of the additions too, is as in the other kernels.
#pragma once

#include <type_traits>

#include "grad_moments/cuda/window_load.cuh"

namespace fisherprune::cuda::grad_moments {

template <Dtype dtype>
struct Dense {
  static constexpr int value = value_bytes<dtype>();
  static constexpr int stage_bits = value == WORD ? 5 : 6;
  static constexpr int stage = 1 << stage_bits;  // positions of a stage
  static constexpr int depth = 32 / value;       // positions of a product
};

struct DenseTask {
  GradMomentsTask moments;
  int unit_bits;  // 2^unit_bits positions of a stage are of one sample: 16, 32 or 64
  int64_t grad_position, input_position;  // strides in bytes

  __device__ int unit_of(int t) const { return t >> unit_bits; }
  __device__ int place_in_unit(int t) const { return t & ((1 << unit_bits) - 1); }
};

// Shared memory: stages of the gradient, then of the input. Each position takes some
// bytes more than its channels: so 16 bytes each of 8 positions lie in different banks,
// or 8 words each of 4 positions.
template <Dtype dtype, int channels>
struct DenseRows {
  static constexpr int value = value_bytes<dtype>();
  static constexpr int pitch = channels * value + 8 * value;  // bytes between positions
  static constexpr int stage = Dense<dtype>::stage * pitch;
};

template <class Tile, Dtype dtype>
constexpr size_t dense_memory_bytes() {
  return Tile::stages *
         (DenseRows<dtype, Tile::rows>::stage + DenseRows<dtype, Tile::columns>::stage);
}

// What a thread copies of one operand: 16 bytes of channels of every `step`-th
// position. Its pointer moves from sample to sample.
template <class Tile, Dtype dtype, int channels>
struct DenseCopies {
  using Rows = DenseRows<dtype, channels>;
  static constexpr int vector = 16 / Rows::value;  // channels
  static constexpr int pieces = channels / vector, step = Tile::threads / pieces;
  static_assert(channels % vector == 0 && Tile::threads % pieces == 0 &&
                Dense<dtype>::depth % step == 0);
  const char* from;  // position `first` of the sample that is next
  int first, to;
  bool exists;  // such channels

  // The tile begins at `channel` of the operand, and its convolution group has `left`
  // channels from there on.
  __device__ DenseCopies(const Operand& of, int64_t position, int64_t channel, int left,
                         int sample)
      : first(threadIdx.x / pieces),
        to(first * Rows::pitch + threadIdx.x % pieces * 16) {
    const int mine = threadIdx.x % pieces * vector;
    from = of.data + sample * of.sample_stride + first * position +
           (channel + mine) * Rows::value;
    exists = mine < left;
  }

  __device__ void start(const DenseTask& task, const Operand& of, int64_t position,
                        const Cursor& next, int end, SharedAddress stage) const {
#pragma unroll
    for (int t = 0; t < Dense<dtype>::stage; t += step) {
      const int unit = task.unit_of(t), at = next.at + task.place_in_unit(t);
      const bool found =
          exists && next.sample + unit < end && at + first < task.moments.positions;
      // Without a byte to read the address need not exist.
      copy16_async(stage + to + t * Rows::pitch,
                   from + unit * of.sample_stride + at * position, found ? 16 : 0);
    }
  }
};

// Where a lane finds its row of four 8 x 8 matrices: two blocks of positions by two
// blocks of channels, in the order of a product's operand; or its word of float32.
template <Dtype dtype, int channels>
__device__ inline int dense_place(int channel, bool positions_first) {
  using Rows = DenseRows<dtype, channels>;
  const int lane = threadIdx.x % 32, matrix = lane / 8;
  if constexpr (dtype == Dtype::float32)
    return lane % 4 * Rows::pitch + (channel + lane / 4) * WORD;
  const int low = matrix % 2 * 8, high = matrix / 2 * 8;
  const int position = lane % 8 + (positions_first ? low : high);
  return position * Rows::pitch + (channel + (positions_first ? high : low)) * 2;
}

// Multiplies 8 positions of float32, which begin at `grad` and `input`.
template <class Tile, Dtype dtype, bool exact, bool first,
          std::enable_if_t<dtype == Dtype::float32, int> = 0>
__device__ inline void multiply_dense(Moments<Tile>& moments, SharedAddress grad,
                                      SharedAddress input) {
  static_assert(!exact, "float32 is rounded to TF32");
  constexpr int grad_pitch = DenseRows<dtype, Tile::rows>::pitch;
  constexpr int input_pitch = DenseRows<dtype, Tile::columns>::pitch;
  uint32_t a[Tile::products_m][4];
#pragma unroll
  for (int i = 0; i < Tile::products_m; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      a[i][e] = __float_as_uint(
          load_shared(grad + (i * 16 + e % 2 * 8) * WORD + e / 2 * 4 * grad_pitch));
    round_operand<dtype>(a[i]);
  }
#pragma unroll
  for (int j = 0; j < Tile::products_n; ++j) {
    uint32_t b[2];
#pragma unroll
    for (int e = 0; e < 2; ++e)
      b[e] = __float_as_uint(load_shared(input + j * 8 * WORD + e * 4 * input_pitch));
    round_operand<dtype>(b);
#pragma unroll
    for (int i = 0; i < Tile::products_m; ++i)
      multiply_into<first>(moments.group[i][j], a[i], b);
  }
}

// Multiplies 16 positions of 16 bits. `first`: of the group.
template <class Tile, Dtype dtype, bool exact, bool first,
          std::enable_if_t<dtype != Dtype::float32, int> = 0>
__device__ inline void multiply_dense(Moments<Tile>& moments, SharedAddress grad,
                                      SharedAddress input) {
  uint32_t a[Tile::products_m][4];
#pragma unroll
  for (int i = 0; i < Tile::products_m; ++i) read_transposed(a[i], grad + i * 16 * 2);
#pragma unroll
  for (int j = 0; j < Tile::products_n; j += 2) {
    uint32_t words[4];
    read_transposed(words, input + j * 8 * 2);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const uint32_t b[2] = {words[2 * side], words[2 * side + 1]};
#pragma unroll
      for (int i = 0; i < Tile::products_m; ++i) {
        float (&group)[4] = moments.group[i][j + side];
        if constexpr (first) group[0] = group[1] = group[2] = group[3] = 0.f;
        if constexpr (first || !exact) {
          multiply_values<dtype>(group, a[i], b);
        } else {
          float c[4] = {0.f, 0.f, 0.f, 0.f};
          multiply_values<dtype>(c, a[i], b);
#pragma unroll
          for (int e = 0; e < 4; ++e) group[e] += c[e];
        }
      }
    }
  }
}

template <class Tile, Dtype dtype, bool exact>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    grad_moments_dense_kernel(const DenseTask task) {
  const GradMomentsTask& m = task.moments;
  const TilePlace tile = tile_place(m, Tile::rows, Tile::columns);
  const SampleRange range = sample_range(m);
  using Grads = DenseCopies<Tile, dtype, Tile::rows>;
  using Inputs = DenseCopies<Tile, dtype, Tile::columns>;
  constexpr int DENSE = Dense<dtype>::stage, DEPTH = Dense<dtype>::depth;
  const int64_t row = static_cast<int64_t>(tile.conv_group) * m.rows + tile.row;
  const int64_t column =
      static_cast<int64_t>(tile.conv_group) * m.columns + tile.column;
  Grads grads(m.grad, task.grad_position, row, m.rows - tile.row, range.first);
  Inputs inputs(m.input, task.input_position, column, m.columns - tile.column,
                range.first);

  const SharedAddress grad_address = shared_address(dynamic_shared());
  const SharedAddress input_address = grad_address + Tile::stages * Grads::Rows::stage;
  const int warp = threadIdx.x / 32;
  const int my_grad = kept(dense_place<dtype, Tile::rows>(
      warp / Tile::warps_n * (Tile::products_m * 16), false));
  const int my_input = kept(dense_place<dtype, Tile::columns>(
      warp % Tile::warps_n * (Tile::products_n * 8), true));

  Cursor loaded{range.first, 0}, cursor = loaded;
  const int unit = 1 << task.unit_bits, units = DENSE >> task.unit_bits;
  Moments<Tile> moments{};
  GroupCount count(m.fresh);
  run_pipeline<Tile, DENSE / DEPTH, 0>(
      moments, m, count, range, cursor,
      [&](int stage, int) {
        if (loaded.sample >= range.end) return;
        grads.start(task, m.grad, task.grad_position, loaded, range.end,
                    grad_address + stage * Grads::Rows::stage);
        inputs.start(task, m.input, task.input_position, loaded, range.end,
                     input_address + stage * Inputs::Rows::stage);
        loaded.at += unit;
        if (loaded.at < m.positions) return;
        loaded = {loaded.sample + units, 0};
        grads.from += units * m.grad.sample_stride;
        inputs.from += units * m.input.sample_stride;
      },
      [](int) {},
      [&](int stage) {
        SharedAddress grad = grad_address + my_grad + stage * Grads::Rows::stage;
        SharedAddress input = input_address + my_input + stage * Inputs::Rows::stage;
#pragma unroll 1
        for (int t = 0; t < DENSE && cursor.sample < range.end; t += DEPTH) {
          __syncwarp();  // a product takes the whole warp; loads may have split it
          if (count.samples == 0 && cursor.at == 0)
            multiply_dense<Tile, dtype, exact, true>(moments, grad, input);
          else
            multiply_dense<Tile, dtype, exact, false>(moments, grad, input);
          grad += DEPTH * Grads::Rows::pitch;
          input += DEPTH * Inputs::Rows::pitch;
          const int sample = cursor.sample;
          cursor.advance(m.positions, DEPTH);
          if (cursor.sample == sample) continue;
          close_sample<Tile>(moments, m, count, cursor.sample == range.end);
          // The rest of this unit lies behind its sample: there is nothing to add.
          const int rest = unit - DEPTH - task.place_in_unit(t);
          t += rest;
          grad += rest * Grads::Rows::pitch;
          input += rest * Inputs::Rows::pitch;
        }
      });
}

}  // namespace fisherprune::cuda::grad_moments
