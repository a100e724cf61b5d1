// Copies of operands of 16 bits that no kernel takes as they lie: whose positions lie
// side by side, but in rows of an odd width, or of which every second one is seen. A
// copy has the channels of each position side by side, and kernels of channels_last
// operands take it.
#pragma once

#include "grad_moments/cuda/lanes_operands.cuh"

namespace fisherprune::cuda::grad_moments {

constexpr int PIXELS_TILE = 64;  // positions, and channels, of a block
constexpr int PIXELS_THREADS = 256;

struct PixelsTask {
  View4 from;
  uint16_t* to;  // [samples, positions, channels]
  int channels, positions, width, channel_tiles;
};

// Each block copies a tile of one sample. A thread reads 16 channels of one position,
// so that neighbouring threads read neighbouring positions; it writes 16 bytes of
// channels by way of shared memory, so that neighbouring threads write neighbouring
// vectors. Each value that is needed is read once and written once.
__global__ void __launch_bounds__(PIXELS_THREADS)
    copy_to_pixels(const PixelsTask task) {
  constexpr int tile = PIXELS_TILE, vector = QUAD_BYTES / 2, pitch = tile + vector;
  constexpr int loads = tile * tile / PIXELS_THREADS, vectors = tile / vector;
  static_assert(PIXELS_THREADS % tile == 0 && loads % vector == 0);
  uint16_t* shared = reinterpret_cast<uint16_t*>(dynamic_shared());
  const int thread = static_cast<int>(threadIdx.x);
  const int block = static_cast<int>(blockIdx.x);
  const int64_t sample = blockIdx.y;
  const int first_channel = block % task.channel_tiles * tile;
  const int first_position = block / task.channel_tiles * tile;

  const int t = thread % tile, mine = thread / tile * loads;
  const int channel = first_channel + mine, position = first_position + t;
  const int line = position / task.width, nth = position - line * task.width;
  const int64_t* stride = task.from.stride;
  const char* from = static_cast<const char*>(task.from.data) +
                     2 * (sample * stride[0] + channel * stride[1] + line * stride[2] +
                          nth * stride[3]);
  uint32_t bits[loads];
#pragma unroll
  for (int i = 0; i < loads; ++i) {
    bits[i] =
        load_if<2>(from, position < task.positions && channel + i < task.channels);
    from += 2 * stride[1];
  }
  const SharedAddress to = shared_address(shared + t * pitch + mine);
#pragma unroll
  for (int i = 0; i < loads; i += vector) {
    uint32_t words[vector / 2];
#pragma unroll
    for (int k = 0; k < vector / 2; ++k)
      words[k] = bits[i + 2 * k] | bits[i + 2 * k + 1] << 16;
    store_shared(to + i * 2, words);
  }
  __syncthreads();
  for (int i = thread; i < tile * vectors; i += PIXELS_THREADS) {
    const int of = first_channel + i % vectors * vector;
    const int at = first_position + i / vectors;
    if (of >= task.channels || at >= task.positions) continue;
    *reinterpret_cast<int4*>(task.to + (sample * task.positions + at) * task.channels +
                             of) =
        *reinterpret_cast<const int4*>(shared + i / vectors * pitch +
                                       i % vectors * vector);
  }
}

// The view of such a copy, which is at `to`.
inline View4 pixels_view(Dtype dtype, void* to, int64_t channels, int64_t height,
                         int64_t width) {
  return {to, dtype, {height * width * channels, 1, width * channels, channels}};
}

// Whether the operands have 16 bits, and vectors of channels in each group.
inline bool may_become_pixels(const GradMoments& m) {
  const ConvShape& s = m.shape;
  constexpr int64_t vector = QUAD_BYTES / 2;
  return m.input.dtype != Dtype::float32 && m.input.dtype == m.grad.dtype &&
         s.group_channels() % vector == 0 && s.group_outputs() % vector == 0 &&
         s.height * s.width < int64_t{1} << 30 &&
         s.samples < 1 << 16;  // blocks in a column of the grid
}

// The values of both copies. Of a convolution without taps only those are copied that
// some output position sees.
inline int64_t pixel_values(const ConvShape& s) {
  const int64_t seen = has_no_taps(s) ? s.positions() : s.height * s.width;
  return s.samples * (s.channels * seen + s.outputs * s.positions());
}

inline int64_t pixel_floats(const ConvShape& s) { return pixel_values(s) / 2; }

// The op on the copies, which lie one after the other from `memory` on.
inline GradMoments as_pixels(GradMoments m, float* memory) {
  ConvShape& s = m.shape;
  if (has_no_taps(s)) {
    s.height = s.out_height, s.width = s.out_width;
    s.stride_h = s.stride_w = 1;
  }
  const int64_t values = s.samples * s.channels * s.height * s.width;
  char* second = reinterpret_cast<char*>(memory) + 2 * values;
  m.input = pixels_view(m.input.dtype, memory, s.channels, s.height, s.width);
  m.grad = pixels_view(m.grad.dtype, second, s.outputs, s.out_height, s.out_width);
  return m;
}

// Fills the copy `to` of a view of `height` x `width` positions.
inline void launch_pixels(const View4& from, const View4& to, const ConvShape& s,
                          int64_t channels, int64_t height, int64_t width,
                          Stream stream) {
  constexpr size_t bytes = PIXELS_TILE * (PIXELS_TILE + QUAD_BYTES / 2) * 2;
  const int64_t channel_tiles = ceil_div(channels, PIXELS_TILE);
  const int64_t tiles = channel_tiles * ceil_div(height * width, PIXELS_TILE);
  PixelsTask task{};
  task.from = from;
  task.to = static_cast<uint16_t*>(const_cast<void*>(to.data));
  task.channels = static_cast<int>(channels);
  task.positions = static_cast<int>(height * width);
  task.width = static_cast<int>(width);
  task.channel_tiles = static_cast<int>(channel_tiles);
  launch(copy_to_pixels,
         dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(s.samples)),
         PIXELS_THREADS, bytes, stream, task);
}

// Copies both operands and returns the op on the copies.
inline GradMoments copied_to_pixels(const GradMoments& m, float* memory,
                                    Stream stream) {
  const GradMoments copied = as_pixels(m, memory);
  View4 seen = m.input;
  if (has_no_taps(m.shape)) {
    seen.stride[2] *= m.shape.stride_h;
    seen.stride[3] *= m.shape.stride_w;
  }
  const ConvShape& s = copied.shape;
  launch_pixels(seen, copied.input, s, s.channels, s.height, s.width, stream);
  launch_pixels(m.grad, copied.grad, s, s.outputs, s.out_height, s.out_width, stream);
  return copied;
}

}  // namespace fisherprune::cuda::grad_moments
