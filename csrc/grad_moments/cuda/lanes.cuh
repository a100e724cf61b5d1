// grad_moments for 3 x 3 convolutions with a border of one, on images of any width; of
// stride 1 or 2. As in taps.cuh a tile has all nine
// taps of 16 channels, the columns of a product are eight channels, and each of a
// warp's nine products in a row has one tap. But here each lane finds the places of its
// own positions: these may lie in two rows of the image.
//
// A stage of the pipeline holds 128 bytes of positions of each output channel, or those
// that are left of a band, see lanes_load.cuh. Nothing is unfolded. Products of 16-bit
// values are exact; float32 is rounded to TF32 in registers. Channels of 16 bits that
// lie side by side are read transposed.
//
// Everything else, the order of the additions too, is as in the other kernels.
#pragma once

#include <type_traits>

#include "grad_moments/cuda/lanes_load.cuh"
#include "grad_moments/cuda/taps.cuh"

namespace fisherprune::cuda::grad_moments {

// What a lane reads of a stage of the gradient, in bytes.
template <class Tile, class Shape>
__device__ inline int lanes_grad_place() {
  if constexpr (Shape::planes) return taps_grad_place<Tile>();
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32;
  const int row = warp / Tile::warps_n * (Tile::products_m * 16);
  if constexpr (Shape::value == WORD)  // a word of four positions
    return lane % 4 * Shape::grad_pitch + (row + lane / 4) * WORD;
  // A row of four matrices: two blocks of positions by two blocks of channels.
  return (lane % 8 + lane / 16 * 8) * Shape::grad_pitch +
         (row + lane / 8 % 2 * 8) * Shape::value;
}

// What it reads of a band at its first position, in bytes of a slot: the first tap in
// pixels, the one in the middle of the first row in planes.
template <class Tile, class Shape>
__device__ inline int lanes_input_place(const LanesTask& task) {
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32;
  const int channel = warp % Tile::warps_n * 8;
  if constexpr (!Shape::planes && Shape::value < WORD) return channel * task.channel;
  return (channel + lane / 4) * task.channel +
         (Shape::planes ? Shape::left * Shape::column : 0);
}

// Reads the gradient at the positions of a product, from `t` of the stage on.
template <class Tile, class Shape>
__device__ inline void read_grads(uint32_t (&a)[Tile::products_m][4],
                                  SharedAddress grad, int t) {
  const SharedAddress from =
      Shape::planes ? flipped(grad, t * Shape::value) : grad + t * Shape::grad_pitch;
#pragma unroll
  for (int i = 0; i < Tile::products_m; ++i) {
    if constexpr (Shape::planes) {
      read_matrices(a[i], from + i * 16 * STAGE_BYTES);
    } else if constexpr (Shape::value < WORD) {
      read_transposed(a[i], from + i * 16 * Shape::value);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        a[i][e] = __float_as_uint(load_shared(from + (i * 16 + e % 2 * 8) * WORD +
                                              e / 2 * 4 * Shape::grad_pitch));
    }
    round_operand<Shape::dtype>(a[i]);
  }
}

// Reads the three taps of a row, for a half of a product's positions.
template <class Shape>
__device__ inline void read_lane_taps(uint32_t (&taps)[3], SharedAddress from) {
  if constexpr (Shape::planes) {
    read_taps<Shape::dtype>(taps, from);
  } else {
#pragma unroll
    for (int x = 0; x < 3; ++x)
      taps[x] = __float_as_uint(load_shared(from + x * Shape::column));
    round_operand<Shape::dtype>(taps);
  }
}

// Multiplies the positions of a product. `place` tells where the lane reads, at a
// position from the product's first one on.
template <class Tile, class Shape, bool first, class Place,
          std::enable_if_t<Shape::planes || Shape::value == WORD, int> = 0>
__device__ inline void multiply_lanes(Moments<Tile>& moments,
                                      const uint32_t (&a)[Tile::products_m][4],
                                      Place place, int row) {
  const int mine = thread_index() % 4 * (WORD / Shape::value);
  SharedAddress one = place(mine), other = place(mine + Shape::vector);
#pragma unroll
  for (int y = 0; y < 3; ++y) {
    uint32_t halves[2][3];
    read_lane_taps<Shape>(halves[0], one);
    read_lane_taps<Shape>(halves[1], other);
#pragma unroll
    for (int x = 0; x < 3; ++x) {
      const uint32_t b[2] = {halves[0][x], halves[1][x]};
#pragma unroll
      for (int i = 0; i < Tile::products_m; ++i)
        multiply_into<first, Shape::dtype>(moments.group[i][y * 3 + x], a[i], b);
    }
    one += row;
    other += row;
  }
}

// The same for pixels of 16 bits: four matrices are 16 positions at two taps.
template <class Tile, class Shape, bool first, class Place,
          std::enable_if_t<!Shape::planes && Shape::value != WORD, int> = 0>
__device__ inline void multiply_lanes(Moments<Tile>& moments,
                                      const uint32_t (&a)[Tile::products_m][4],
                                      Place place, int row) {
  const int lane = thread_index() % 32;
  const SharedAddress at = place(lane % 16);
  // The next tap is in the same row, or the first one of the next row.
  const SharedAddress along = at + (lane < 16 ? 0 : Shape::column);
  const SharedAddress across = at + (lane < 16 ? 0 : row - 2 * Shape::column);
#pragma unroll
  for (int tap = 0; tap < TAPS; tap += 2) {
    const SharedAddress from = tap == TAPS - 1 ? at : tap % 3 == 2 ? across : along;
    // Or the compiler would read all taps first, for which registers are missing.
    if (tap == 4) __syncwarp();
    uint32_t words[4];
    read_transposed(words, from + tap / 3 * row + tap % 3 * Shape::column);
#pragma unroll
    for (int next = 0; next < (tap == TAPS - 1 ? 1 : 2); ++next) {
      const uint32_t b[2] = {words[2 * next], words[2 * next + 1]};
#pragma unroll
      for (int i = 0; i < Tile::products_m; ++i)
        multiply_into<first, Shape::dtype>(moments.group[i][tap + next], a[i], b);
    }
  }
}

template <class Tile, Layout layout, int stride, Dtype dtype>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    grad_moments_lanes_kernel(const LanesTask task) {
  using Shape = LanesShape<Tile, layout, stride, dtype>;
  const GradMomentsTask& m = task.moments;
  unsigned char* shared = dynamic_shared();
  // No copy writes to the borders.
  for (int i = threadIdx.x; i < task.slots * task.slot / WORD; i += Tile::threads)
    reinterpret_cast<float*>(shared + Shape::slots_at)[i] = 0.f;
  const TilePlace tile = tile_place(m, Tile::rows, Tile::columns);
  const SampleRange samples = sample_range(m);
  LanesCopies<Tile, Shape> copies(m, tile, samples);
  __syncthreads();

  const SharedAddress grads = shared_address(shared) + Shape::grad_at;
  const SharedAddress slots = shared_address(shared) + Shape::slots_at;
  const SampleRange range{samples.first - samples.end, 0};  // counted up to zero
  Cursor cursor{range.first, 0};
  Slot slot{0};
  Moments<Tile> moments{};
  GroupCount count(m.fresh);
  run_pipeline<Tile, 1, 0>(
      moments, m, count, range, cursor,
      [&](int stage, int) {
        if (copies.samples > 0)
          copies.start(task, grads + stage * Shape::grad_stage, slots);
      },
      [](int) {},
      [&](int stage) {
        const SharedAddress grad =
            grads + stage * Shape::grad_stage + lanes_grad_place<Tile, Shape>();
        const SharedAddress window =
            slots + slot.at + lanes_input_place<Tile, Shape>(task);
        const Band band = task.band_at(cursor.at);
        // A position behind the band's last one stands for that one: its gradient is
        // zero, and what lies there might be infinite.
        constexpr int word = Shape::planes ? WORD / Shape::value : 1;  // of positions
        const int last = band.end - band.first - word;
#pragma unroll 1  // more would not fit in the registers
        for (int t = 0; t < Shape::stage && cursor.at < band.end; t += Shape::depth) {
          __syncwarp();  // a product takes the whole warp; loads may have split it
          uint32_t a[Tile::products_m][4];
          read_grads<Tile, Shape>(a, grad, t);
          const int behind = cursor.at - band.first;
          const auto place = [&](int mine) {
            mine = behind + mine < last ? behind + mine : last;
            return window + (mine * (stride * Shape::column) +
                             m.width_divider(mine) * task.row_jump);
          };
          if (count.samples == 0 && cursor.at == 0)
            multiply_lanes<Tile, Shape, true>(moments, a, place, task.row);
          else
            multiply_lanes<Tile, Shape, false>(moments, a, place, task.row);
          cursor.at += Shape::depth;
        }
        if (cursor.at < band.end) return;
        slot.move_on(task);
        cursor.at = band.end;
        if (cursor.at < m.positions) return;
        cursor = {cursor.sample + 1, 0};
        close_sample<Tile>(moments, m, count, cursor.sample == 0);
      });
}

}  // namespace fisherprune::cuda::grad_moments
