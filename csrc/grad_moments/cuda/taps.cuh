// grad_moments for 3 x 3 convolutions that keep the image's size, on images of 4, 8, 16
// or 32 columns: most layers of residual networks. A tile has all nine taps of 16
// channels. The columns of a product are eight channels, and each of a warp's nine
// products in a row has one tap: so the place of a tap in shared memory is the same for
// all lanes, and known to the compiler.
//
// A stage of the pipeline holds 128 bytes of positions of each output channel, or of
// two or four samples of 4 x 4. Products of 16-bit values are exact; float32 is rounded
// to TF32 in registers.
//
// Everything else, the order of the additions too, is as in the other kernels.
#pragma once

#include "grad_moments/cuda/taps_load.cuh"

namespace fisherprune::cuda::grad_moments {

// Reads the three taps of a row, for a half of a product's positions. `from`: the
// middle tap's value at the lane's position.
template <Dtype dtype>
__device__ inline void read_taps(uint32_t (&taps)[3], SharedAddress from) {
#pragma unroll
  for (int x = 0; x < 3; ++x)
    taps[x] = __float_as_uint(load_shared(from + (x - 1) * WORD));
  if constexpr (dtype == Dtype::float32) {
    round_operand<dtype>(taps);
  } else {  // two neighbouring positions, from odd ones too
    taps[0] = taps[0] >> 16 | taps[1] << 16;
    taps[2] = taps[1] >> 16 | taps[2] << 16;
  }
}

// Multiplies 32 bytes of positions; `grad` and `window` are the lane's places of the
// first ones. Where a half is a row, the second half's row is the first half's next
// one.
template <class Tile, int bits, Dtype dtype, bool first>
__device__ inline void multiply_taps(Moments<Tile>& moments, SharedAddress grad,
                                     SharedAddress window) {
  using Image = grad_moments::Image<bits, dtype>;
  uint32_t a[Tile::products_m][4];
#pragma unroll
  for (int i = 0; i < Tile::products_m; ++i) {
    read_matrices(a[i], grad + i * 16 * STAGE_BYTES);
    round_operand<dtype>(a[i]);
  }
  constexpr bool of_samples = Image::units > 1;
  constexpr bool shares = Image::row == QUAD_BYTES && !of_samples;
  uint32_t halves[2][3];
#pragma unroll
  for (int y = 0; y < 3; ++y) {
    const SharedAddress row = window + y * Image::pitch;
    // Or the compiler would read all rows first, for which registers are missing.
    if (of_samples && y > 0) __syncwarp();
    if (y == 0 || !shares)
      read_taps<dtype>(halves[0], row);
    else
#pragma unroll
      for (int x = 0; x < 3; ++x) halves[0][x] = halves[1][x];
    read_taps<dtype>(halves[1], row + Image::place(QUAD_BYTES / Image::value));
#pragma unroll
    for (int x = 0; x < 3; ++x) {
      const uint32_t b[2] = {halves[0][x], halves[1][x]};
#pragma unroll
      for (int i = 0; i < Tile::products_m; ++i)
        multiply_into<first, dtype>(moments.group[i][y * 3 + x], a[i], b);
    }
  }
}

// `first`: of the group.
template <class Tile, int bits, Dtype dtype>
__device__ inline void multiply_taps(Moments<Tile>& moments, SharedAddress grad,
                                     SharedAddress window, bool first) {
  if (first)
    multiply_taps<Tile, bits, dtype, true>(moments, grad, window);
  else
    multiply_taps<Tile, bits, dtype, false>(moments, grad, window);
}

// The place of a lane's channel's middle tap at its first position, in bytes of a slot.
template <class Tile, int bits, Dtype dtype>
__device__ inline int taps_input_place(const TapsTask& task) {
  using Image = grad_moments::Image<bits, dtype>;
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32;
  const int channel = warp % Tile::warps_n * 8 + lane / 4;
  return channel * task.channel + Image::piece +
         Image::place(lane % 4 * (WORD / Image::value));
}

template <class Tile, int bits, Dtype dtype>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    grad_moments_taps_kernel(const TapsTask task) {
  using Image = grad_moments::Image<bits, dtype>;
  using Places = TapsPlaces<Tile, bits, dtype>;
  using Memory = TapsMemory<Tile>;
  const GradMomentsTask& m = task.moments;
  unsigned char* shared = dynamic_shared();
  // No copy writes to the borders.
  for (int i = threadIdx.x; i < task.slots * task.slot / WORD; i += Tile::threads)
    reinterpret_cast<float*>(shared + Memory::slots_at)[i] = 0.f;
  const TilePlace tile = tile_place(m, Tile::rows, Tile::columns);
  const SampleRange samples = sample_range(m);
  TapsCopies<Tile, bits, dtype> copies(task, tile, samples);
  __syncthreads();

  const SharedAddress grads = shared_address(shared) + Memory::grad_at;
  const SharedAddress slots = shared_address(shared) + Memory::slots_at;
  // What is left, in products one behind the other, is counted up to zero: neither the
  // end nor how far the copies are takes a register.
  constexpr int depth = 2 * QUAD_BYTES / Image::value;  // positions of a product
  constexpr bool of_samples = Image::units > 1;
  const int positions = of_samples ? Image::unit : m.positions;
  const SampleRange range{(samples.first - samples.end) * (positions / depth), 0};
  Cursor cursor{range.first, 0};
  Slot slot{0};
  Moments<Tile> moments{};
  GroupCount count(m.fresh);
  run_pipeline<Tile, Image::units, 0>(
      moments, m, count, range, cursor,
      [&](int stage, int lead) {
        const int left = -cursor.sample - lead * (QUADS / 2);
        if (left <= 0) return;
        const int units = left / (Image::unit / depth);
        copies.start_grad(task, grads + stage * Memory::grad_stage, units);
        if constexpr (of_samples)
          copies.start_images(task, slots + stage * task.slot, units);
        else
          copies.start_rows(task, slots);
        copies.advance(task);
      },
      [](int) {},
      [&](int stage) {
        const SharedAddress grad =
            grads + stage * Memory::grad_stage + taps_grad_place<Tile>();
        const SharedAddress window = slots +
                                     (of_samples ? stage * task.slot : slot.at) +
                                     taps_input_place<Tile, bits, dtype>(task);
#pragma unroll 1  // more would not fit in the registers
        for (int i = 0; i < QUADS / 2 && cursor.sample < 0; ++i) {
          __syncwarp();  // a product takes the whole warp; loads may have split it
          const int at = of_samples ? i * depth % Image::unit : task.in_band(cursor.at);
          const int unit = i * depth / Image::unit * Places::channels * task.channel;
          multiply_taps<Tile, bits, dtype>(
              moments, flipped(grad, i * 2 * QUAD_BYTES),
              window + unit + Image::place(at),
              count.samples == 0 && (of_samples ? at : cursor.at) == 0);
          ++cursor.sample;
          if constexpr (of_samples) {
            if (at + depth < Image::unit) continue;
          } else {
            cursor.at += depth;
            if (cursor.at < m.positions) continue;
            cursor.at = 0;
          }
          close_sample<Tile>(moments, m, count, cursor.sample == 0);
        }
        if (!of_samples && task.in_band(cursor.at) == 0) slot.move_on(task);
      });
}

}  // namespace fisherprune::cuda::grad_moments
