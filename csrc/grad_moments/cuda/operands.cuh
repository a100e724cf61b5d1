// Which operands suit the kernels that do not gather, and how images lie in their
// shared memory.
#pragma once

#include <algorithm>
#include <optional>

#include "grad_moments/cuda/dense.cuh"
#include "grad_moments/cuda/window.cuh"

namespace fisherprune::cuda::grad_moments {

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// Whether the data begins at a multiple of four values.
inline bool starts_with_a_vector(const View4& v) {
  return reinterpret_cast<uintptr_t>(v.data) % (4 * size_of(v.dtype)) == 0;
}

// Whether the positions of a channel are one row without gaps, at a multiple of four
// values.
inline bool rows_are_vectors(const View4& v, int64_t height, int64_t width) {
  return (width == 1 || v.stride[3] == 1) && (height == 1 || v.stride[2] == width) &&
         v.stride[0] % 4 == 0 && v.stride[1] % 4 == 0 && starts_with_a_vector(v);
}

inline bool both_float32(const GradMoments& m) {
  return m.input.dtype == Dtype::float32 && m.grad.dtype == Dtype::float32;
}

// Whether each row of an image begins at a multiple of four values.
inline bool rows_are_aligned(const View4& v) {
  return v.stride[3] == 1 && v.stride[0] % 4 == 0 && v.stride[1] % 4 == 0 &&
         v.stride[2] % 4 == 0 && starts_with_a_vector(v);
}

inline bool is_small(const ConvShape& s) {
  return s.height == 2 && s.width == 2 && s.out_height == 2 && s.out_width == 2;
}

inline bool window_suits(const GradMoments& m) {
  const ConvShape& s = m.shape;
  if (m.input.dtype != m.grad.dtype || s.kernel_h * s.kernel_w == 1 ||
      !rows_are_vectors(m.grad, s.out_height, s.out_width))
    return false;
  if (is_small(s)) return rows_are_vectors(m.input, s.height, s.width);
  const int64_t across = s.out_width;
  return s.width % 4 == 0 &&
         (across == 4 || across == 8 || across == 16 || across % WINDOW == 0) &&
         s.positions() > SLAB / 2 && rows_are_aligned(m.input);
}

// How an image of one channel lies in shared memory.
inline Window window_of(const ConvShape& s) {
  Window w{};
  w.unit = is_small(s) ? SMALL : s.positions() <= SLAB ? SLAB : WINDOW;
  w.units = WINDOW / w.unit;
  const int64_t across = std::min<int64_t>(s.out_width, WINDOW);
  while (1 << w.column_bits < across) ++w.column_bits;
  if (is_small(s)) {
    w.rows = 1;
    w.first_row = static_cast<int>(s.pad_h);
    w.channel = 2 * SMALL;
    return w;
  }
  const int64_t rows =
      (w.unit / across - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1;
  const int64_t left = at_least(s.pad_w, 0, 4);
  const int64_t pitch = window_pitch(left + s.width, s.stride_w);
  w.rows = static_cast<int>(rows);
  w.left = static_cast<int>(left);
  w.pitch = static_cast<int>(pitch);
  const int64_t channel = at_least(rows * pitch + left, s.kernel_h * pitch % 32, 32);
  constexpr int64_t too_much = 1 << 20;  // more than any shared memory holds
  w.channel = static_cast<int>(std::min(channel, too_much));
  return w;
}

// How the tile's images lie in shared memory, where they suit the kernel and fit.
template <class Tile>
std::optional<Window> find_window(const GradMoments& m) {
  const ConvShape& s = m.shape;
  if (!window_suits(m)) return std::nullopt;
  Window w = window_of(s);
  const size_t limit = most_shared_bytes() / Tile::blocks - RESERVED_BYTES;
  if (static_cast<size_t>(w.channel) * WORD > limit) return std::nullopt;
  const int64_t taps = s.kernel_h * s.kernel_w;
  w.channels = static_cast<int>(
      std::min(s.group_channels(), (Tile::columns + taps - 2) / taps + 1));
  w.pieces = w.channels * w.rows * static_cast<int>(ceil_div(s.width, 4));
  w.bytes = w.channels * w.channel * WORD;
  if (window_memory_bytes<Tile>(w) > limit) return std::nullopt;
  return w;
}

// Whether channels are neighbours, in vectors of 16 bytes, and positions equally far
// apart.
inline bool channels_are_vectors(const View4& v, int64_t height, int64_t width) {
  return v.stride[1] == 1 && v.stride[0] % 8 == 0 &&
         (width == 1 || v.stride[3] % 8 == 0) &&
         (height == 1 || v.stride[2] % 8 == 0) &&
         (width == 1 || height == 1 || v.stride[2] == width * v.stride[3]) &&
         reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
}

inline bool is_pointwise(const ConvShape& s) {
  return s.kernel_h == 1 && s.kernel_w == 1 && s.stride_h == 1 && s.stride_w == 1 &&
         s.pad_h == 0 && s.pad_w == 0;
}

inline bool dense_suits(const GradMoments& m) {
  const ConvShape& s = m.shape;
  return m.input.dtype == m.grad.dtype && m.input.dtype != Dtype::float32 &&
         is_pointwise(s) && s.positions() > SLAB / 2 && s.group_channels() % 8 == 0 &&
         s.group_outputs() % 8 == 0 &&
         channels_are_vectors(m.input, s.height, s.width) &&
         channels_are_vectors(m.grad, s.out_height, s.out_width) &&
         dense_memory_bytes<DenseTile>() <= most_shared_bytes();
}

}  // namespace fisherprune::cuda::grad_moments
