// Which operands suit the kernels that do not gather, and how images lie in their
// shared memory.
#pragma once

#include <algorithm>
#include <optional>

#include "grad_moments/cuda/taps.cuh"
#include "grad_moments/cuda/wgmma.cuh"
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

// Whether each channel's positions are one row of vectors of 16 bytes, and everything
// lies within 32 bits.
inline bool channels_are_rows(const View4& v, const ConvShape& s, int64_t channels) {
  const int64_t size = size_of(v.dtype), vector = 16 / size;
  const int64_t last =
      (s.samples - 1) * v.stride[0] + (channels - 1) * v.stride[1] + s.positions();
  return v.stride[3] == 1 && v.stride[2] == s.width && v.stride[0] % vector == 0 &&
         v.stride[1] % vector == 0 && reinterpret_cast<uintptr_t>(v.data) % 16 == 0 &&
         last * size < int64_t{1} << 32;
}

// How the tile's images lie in bands of `stages` stages.
template <class Tile, class Image>
void set_bands(TapsTask& task, int64_t positions, int stages) {
  task.band = stages * Image::unit;
  task.whole = task.band == positions;
  task.channel = Image::channel(stages * Image::rows + Image::seen - Image::rows);
  task.slot = Image::units * (Tile::columns / TAPS) * task.channel;
  // Of the stages that are copied or multiplied at once, each may be in another band.
  task.slots = static_cast<int>(ceil_div(Tile::stages - 1, stages)) + 1;
}

// Chooses the longest bands that have room, if any have.
template <class Tile, class Image>
bool choose_bands(TapsTask& task, int64_t positions) {
  const size_t limit = most_shared_bytes() / Tile::blocks - RESERVED_BYTES;
  for (int stages = 8; stages > 0; stages /= 2) {
    if (positions / Image::unit % stages != 0) continue;
    set_bands<Tile, Image>(task, positions, stages);
    if (taps_memory_bytes<Tile>(task) <= limit) return true;
  }
  return false;
}

template <int bits, class Action>
auto with_image_of(Dtype dtype, Action action) {
  switch (dtype) {
    case Dtype::float16:
      return action(Image<bits, Dtype::float16>{});
    case Dtype::bfloat16:
      return action(Image<bits, Dtype::bfloat16>{});
    default:
      return action(Image<bits, Dtype::float32>{});
  }
}

// For images 4, 8, 16 or 32 wide.
template <class Action>
auto with_image(const GradMoments& m, Action action) {
  switch (m.shape.width) {
    case 4:
      return with_image_of<2>(m.input.dtype, action);
    case 8:
      return with_image_of<3>(m.input.dtype, action);
    case 16:
      return with_image_of<4>(m.input.dtype, action);
    default:
      return with_image_of<5>(m.input.dtype, action);
  }
}

inline bool keeps_the_size(const ConvShape& s) {
  return s.kernel_h == 3 && s.kernel_w == 3 && s.stride_h == 1 && s.stride_w == 1 &&
         s.dilation_h == 1 && s.dilation_w == 1 && s.pad_h == 1 && s.pad_w == 1;
}

inline bool has_usual_width(const ConvShape& s) {
  return s.width == 4 || s.width == 8 || s.width == 16 || s.width == 32;
}

// Whether the kernel of nine taps can take the tile: of such images, all rows and
// columns of tiles that are full.
template <class Tile>
bool taps_suit(const GradMoments& m) {
  const ConvShape& s = m.shape;
  if (m.input.dtype != m.grad.dtype || !keeps_the_size(s) || !has_usual_width(s) ||
      s.patch() % Tile::columns != 0 || s.group_outputs() % Tile::rows != 0 ||
      !channels_are_rows(m.input, s, s.channels) ||
      !channels_are_rows(m.grad, s, s.outputs) ||
      s.samples > (int64_t{1} << 30) / s.positions())
    return false;
  return with_image(m, [&](auto image) {
    using Image = decltype(image);
    TapsTask task{};
    const bool fills = Image::units > 1 ? s.positions() == Image::unit
                                        : s.positions() % Image::unit == 0;
    return fills && choose_bands<Tile, Image>(task, s.positions());
  });
}

// For images of the usual widths.
template <class Action>
auto with_wgmma_image(int64_t width, Action action) {
  switch (width) {
    case 4:
      return action(WgmmaImage<2>{});
    case 8:
      return action(WgmmaImage<3>{});
    case 16:
      return action(WgmmaImage<4>{});
    default:
      return action(WgmmaImage<5>{});
  }
}

// Whether copies can take the operand's boxes: each channel's positions are one row.
inline bool has_boxes(const View4& v, const ConvShape& s) {
  const auto is_stride = [](int64_t stride) {
    return stride > 0 && stride % 4 == 0 && stride < int64_t{1} << 37;
  };
  return v.dtype == Dtype::float32 && v.stride[3] == 1 && v.stride[2] == s.width &&
         is_stride(v.stride[0]) && is_stride(v.stride[1]) && starts_with_a_vector(v);
}

// Whether the kernel of products of warpgroups can multiply the operands.
inline bool wgmma_suits(const GradMoments& m) {
  const ConvShape& s = m.shape;
  if (!keeps_the_size(s) || !has_usual_width(s) || !has_boxes(m.input, s) ||
      !has_boxes(m.grad, s))
    return false;
  return with_wgmma_image(s.width, [&](auto image) {
    constexpr int unit = decltype(image)::unit;
    return s.width == 4 ? s.positions() == unit : s.positions() % unit == 0;
  });
}

// Whether positions are equally far apart.
inline bool positions_are_even(const View4& v, int64_t height, int64_t width) {
  return width == 1 || height == 1 || v.stride[2] == width * v.stride[3];
}

// Whether channels are neighbours, in vectors of 16 bytes.
inline bool channels_are_vectors(const View4& v, int64_t height, int64_t width) {
  const int64_t vector = QUAD_BYTES / size_of(v.dtype);
  return v.stride[1] == 1 && v.stride[0] % vector == 0 &&
         (width == 1 || v.stride[3] % vector == 0) &&
         (height == 1 || v.stride[2] % vector == 0) &&
         reinterpret_cast<uintptr_t>(v.data) % QUAD_BYTES == 0;
}

// Whether both operands have vectors of channels in each group.
inline bool are_vectors_of_channels(const GradMoments& m) {
  const ConvShape& s = m.shape;
  const int64_t vector = QUAD_BYTES / size_of(m.input.dtype);
  return s.group_channels() % vector == 0 && s.group_outputs() % vector == 0 &&
         channels_are_vectors(m.input, s.height, s.width) &&
         channels_are_vectors(m.grad, s.out_height, s.out_width);
}

inline bool is_pointwise(const ConvShape& s) {
  return s.kernel_h == 1 && s.kernel_w == 1 && s.stride_h == 1 && s.stride_w == 1 &&
         s.pad_h == 0 && s.pad_w == 0;
}

// Whether rows of `row` values begin at multiples of `piece` values, and have a
// multiple of them.
inline bool has_pieces(const View4& v, int64_t row, int64_t piece) {
  return v.stride[0] % piece == 0 && v.stride[1] % piece == 0 && row % piece == 0 &&
         reinterpret_cast<uintptr_t>(v.data) % (piece * size_of(v.dtype)) == 0;
}

inline bool rows_have_pieces(const View4& v, int64_t width, int64_t piece) {
  return has_pieces(v, width, piece) && v.stride[2] % piece == 0;
}

}  // namespace fisherprune::cuda::grad_moments
