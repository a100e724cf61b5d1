// How operands without taps lie in the shared memory of dense.cuh, and the way there.
// Copies are of 16 bytes, or where positions lie side by side and rows do not allow it,
// of 4.
#pragma once

#include "grad_moments/cuda/taps_load.cuh"

namespace fisherprune::cuda::grad_moments {

// How `channels` channels of a stage lie in shared memory. In planes, as in the other
// kernels. In pixels, each position takes some bytes more than its channels: so 16
// bytes each of 8 positions lie in different banks, or 8 words each of 4 positions.
template <Layout layout_, Dtype dtype_>
struct DenseShape {
  static constexpr Layout layout = layout_;
  static constexpr Dtype dtype = dtype_;
  static constexpr bool planes = layout == Layout::planes;
  static constexpr int value = value_bytes<dtype>();
  static constexpr int vector = QUAD_BYTES / value;  // values of a copy of 16 bytes
  static constexpr int stage_bits = value == WORD ? 5 : 6;
  static constexpr int stage = 1 << stage_bits;  // positions of a stage
  static constexpr int depth = 2 * vector;       // positions of a product
  static_assert(stage * value == STAGE_BYTES);

  // Bytes from position to position in pixels.
  __host__ __device__ static constexpr int pitch(int channels) {
    return (channels + 8) * value;
  }
  __host__ __device__ static constexpr int stage_bytes(int channels) {
    return planes ? channels * STAGE_BYTES : stage * pitch(channels);
  }
};

// Where a channel's positions lie in memory, from the first one on, in bytes.
struct DensePlaces {
  Divider divider;      // by the positions of a row
  int width;            // of a row
  int64_t row, column;  // from row to row, from position to position

  __device__ int64_t operator()(int t) const {
    const int line = divider(t);
    return line * row + (t - line * width) * column;
  }
};

struct DenseTask {
  GradMomentsTask moments;
  int unit_bits;  // 2^unit_bits positions of a stage are of one sample: 16, 32 or 64
  DensePlaces grad, input;
  bool grad_vectors, input_vectors;  // in planes: copied 16 bytes at a time

  __device__ int unit_of(int t) const { return t >> unit_bits; }
  __device__ int place_in_unit(int t) const { return t & ((1 << unit_bits) - 1); }
};

template <class Tile, class Shape>
constexpr size_t dense_memory_bytes() {
  return Tile::stages *
         (Shape::stage_bytes(Tile::rows) + Shape::stage_bytes(Tile::columns));
}

// What a block copies of one operand. The pointer moves from sample to sample.
template <class Tile, class Shape, int channels>
struct DenseCopies {
  const char* from;  // the tile's first channel of the sample that is next
  int left;          // channels that exist, from there on

  __device__ DenseCopies(const Operand& of, int64_t channel_stride, int64_t channel,
                         int of_group, int sample)
      : from(of.data + sample * of.sample_stride + channel * channel_stride),
        left(of_group) {}

  // Each thread copies a piece of positions of every `step`-th channel.
  template <int bytes>
  __device__ void start_planes(const DenseTask& task, const Operand& of,
                               const DensePlaces& places, int64_t channel_stride,
                               const Cursor& next, int end, SharedAddress stage) const {
    constexpr int pieces = STAGE_BYTES / bytes, step = Tile::threads / pieces;
    static_assert(channels % step == 0 && step % 8 == 0);
    const int thread = thread_index(), first = thread / pieces;
    const int place = thread % pieces * bytes;  // in a row of the stage
    const int t = place / Shape::value, unit = task.unit_of(t);
    const int at = next.at + task.place_in_unit(t);
    const int size =
        next.sample + unit < end ? (task.moments.positions - at) * Shape::value : 0;
    const char* mine =
        from + first * channel_stride + unit * of.sample_stride + places(at);
    const SharedAddress to =
        stage + grad_place(first, place / QUAD_BYTES) * WORD + place % QUAD_BYTES;
#pragma unroll
    for (int i = 0; i < channels; i += step) {
      // Of channels that do not exist, nobody uses what lies there.
      if (first + i < left) copy_piece<bytes>(to + i * STAGE_BYTES, mine, size);
      mine += step * channel_stride;
    }
  }

  // Each thread copies a piece of the channels of every `step`-th position.
  __device__ void start_pixels(const DenseTask& task, const Operand& of,
                               const DensePlaces& places, const Cursor& next, int end,
                               SharedAddress stage) const {
    constexpr int pieces = channels / Shape::vector, step = Tile::threads / pieces;
    static_assert(channels % Shape::vector == 0 && Tile::threads % pieces == 0 &&
                  Shape::depth % step == 0);
    const int thread = thread_index(), first = thread / pieces;
    const int piece = thread % pieces;
    const bool exists = piece * Shape::vector < left;
    const SharedAddress to =
        stage + first * Shape::pitch(channels) + piece * QUAD_BYTES;
#pragma unroll
    for (int t = 0; t < Shape::stage; t += step) {
      const int unit = task.unit_of(t), at = next.at + task.place_in_unit(t) + first;
      const bool found =
          exists && next.sample + unit < end && at < task.moments.positions;
      copy_piece<QUAD_BYTES>(
          to + t * Shape::pitch(channels),
          from + piece * QUAD_BYTES + unit * of.sample_stride + places(at),
          found ? QUAD_BYTES : 0);
    }
  }

  __device__ void start(const DenseTask& task, const Operand& of,
                        const DensePlaces& places, int64_t channel_stride, bool vectors,
                        const Cursor& next, int end, SharedAddress stage) const {
    if constexpr (!Shape::planes)
      start_pixels(task, of, places, next, end, stage);
    else if (vectors)
      start_planes<QUAD_BYTES>(task, of, places, channel_stride, next, end, stage);
    else
      start_planes<WORD>(task, of, places, channel_stride, next, end, stage);
  }
};

}  // namespace fisherprune::cuda::grad_moments
