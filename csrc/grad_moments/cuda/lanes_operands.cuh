// Which operands suit the kernel whose lanes find the places of their positions, and
// how images lie in its bands.
#pragma once

#include "grad_moments/cuda/dense_operands.cuh"
#include "grad_moments/cuda/lanes.cuh"

namespace fisherprune::cuda::grad_moments {

// Whether a byte's offset in the data takes 32 bits.
inline bool lies_within_32_bits(const View4& v, int64_t samples, int64_t channels,
                                int64_t height, int64_t width) {
  const int64_t last = (samples - 1) * v.stride[0] + (channels - 1) * v.stride[1] +
                       (height - 1) * v.stride[2] + (width - 1) * v.stride[3];
  return (last + 1) * size_of(v.dtype) < int64_t{1} << 32;
}

// Whether positions lie side by side. Two values of 16 bits are copied and read at
// once: they must be in one row, and two neighbouring positions must see them.
inline bool are_planes(const GradMoments& m) {
  const ConvShape& s = m.shape;
  const int64_t word = WORD / size_of(m.input.dtype);
  return (s.stride_h == 1 || word == 1) && m.input.stride[3] == 1 &&
         m.grad.stride[3] == 1 && m.grad.stride[2] == s.out_width &&
         rows_have_pieces(m.input, s.width, word) &&
         rows_have_pieces(m.grad, s.out_width, word);
}

inline bool are_pixels(const GradMoments& m) {
  const ConvShape& s = m.shape;
  return are_vectors_of_channels(m) &&
         positions_are_even(m.grad, s.out_height, s.out_width);
}

// How the tile's images lie in bands of `band_rows` output rows.
template <class Shape>
void set_lane_bands(LanesTask& task, const ConvShape& s, int64_t band_rows) {
  task.band = static_cast<int>(band_rows * s.out_width);
  task.rows = static_cast<int>((band_rows - 1) * s.stride_h + s.kernel_h);
  const int64_t piece = task.image_vectors ? Shape::vector : WORD / Shape::value;
  task.pieces = static_cast<int>(Shape::planes ? s.width / piece : s.width);
  const int64_t row = Shape::row(s.width, s.out_width), rows = task.rows * row;
  task.row = static_cast<int>(row);
  task.band_divider = Divider(static_cast<uint32_t>(task.band));
  task.piece_divider = Divider(static_cast<uint32_t>(task.pieces));
  task.row_jump =
      static_cast<int>(s.stride_h * (row - s.out_width * int64_t{Shape::column}));
  task.channel = static_cast<int>(Shape::channel(rows));
  task.slot = static_cast<int>(Shape::slot(rows));
}

// Chooses the longest bands that have room, if any have. Bands that are copied 16 bytes
// at a time begin at multiples of 16 bytes.
template <class Tile, class Shape>
bool choose_lane_bands(LanesTask& task, const ConvShape& s) {
  const size_t limit = most_shared_bytes() / Tile::blocks - RESERVED_BYTES;
  for (int64_t bands = 1; bands <= s.out_height; ++bands) {
    const int64_t band_rows = ceil_div(s.out_height, bands);
    const int64_t positions = band_rows * s.out_width;
    if (bands > 1 && task.grad_vectors && positions % Shape::vector != 0) continue;
    const int64_t slot = Shape::slot(((band_rows - 1) * s.stride_h + s.kernel_h) *
                                     Shape::row(s.width, s.out_width));
    // Stages of the shortest band. Of those that are copied or multiplied at once, each
    // may be in another band.
    const int64_t rest = s.positions() % positions;
    const int64_t stages = ceil_div(rest ? rest : positions, Shape::stage);
    const int64_t slots = ceil_div(Tile::stages - 1, stages) + 1;
    if (Shape::slots_at + slots * slot > static_cast<int64_t>(limit)) continue;
    set_lane_bands<Shape>(task, s, band_rows);
    task.slots = static_cast<int>(slots);
    return true;
  }
  return false;
}

// The task's bands, and of what size the copies are. Gradients of any alignment can be
// copied 4 bytes at a time.
template <class Tile, class Shape>
bool plan_lanes(LanesTask& task, const GradMoments& m) {
  const ConvShape& s = m.shape;
  constexpr int64_t vector = Shape::vector;
  task.image_vectors = Shape::planes && rows_have_pieces(m.input, s.width, vector);
  task.grad_vectors = Shape::planes && has_pieces(m.grad, s.positions(), vector);
  if (choose_lane_bands<Tile, Shape>(task, s)) return true;
  task.grad_vectors = false;
  return choose_lane_bands<Tile, Shape>(task, s);
}

// For operands whose layout suits the kernel.
template <class Tile, Dtype dtype, class Action>
auto with_lanes_shape_of(const GradMoments& m, Action action) {
  if constexpr (dtype == Dtype::float32)
    if (are_planes(m) && m.shape.stride_h == 2)
      return action(LanesShape<Tile, Layout::planes, 2, dtype>{});
  if (are_planes(m)) return action(LanesShape<Tile, Layout::planes, 1, dtype>{});
  if (m.shape.stride_h == 1)
    return action(LanesShape<Tile, Layout::pixels, 1, dtype>{});
  return action(LanesShape<Tile, Layout::pixels, 2, dtype>{});
}

template <class Tile, class Action>
auto with_lanes_shape(const GradMoments& m, Action action) {
  switch (m.input.dtype) {
    case Dtype::float16:
      return with_lanes_shape_of<Tile, Dtype::float16>(m, action);
    case Dtype::bfloat16:
      return with_lanes_shape_of<Tile, Dtype::bfloat16>(m, action);
    default:
      return with_lanes_shape_of<Tile, Dtype::float32>(m, action);
  }
}

template <class Tile>
bool lanes_suit(const GradMoments& m) {
  const ConvShape& s = m.shape;
  const bool has_border_of_one = s.pad_h == 1 && s.pad_w == 1;
  const bool has_stride = s.stride_h == s.stride_w && s.stride_h <= 2;
  if (m.input.dtype != m.grad.dtype || s.kernel_h != 3 || s.kernel_w != 3 ||
      s.dilation_h != 1 || s.dilation_w != 1 || !has_border_of_one || !has_stride ||
      s.positions() <= SLAB / 2 || (!are_planes(m) && !are_pixels(m)) ||
      !lies_within_32_bits(m.input, s.samples, s.channels, s.height, s.width) ||
      !lies_within_32_bits(m.grad, s.samples, s.outputs, s.out_height, s.out_width))
    return false;
  return with_lanes_shape<Tile>(m, [&](auto shape) {
    LanesTask task{};
    return plan_lanes<Tile, decltype(shape)>(task, m);
  });
}

}  // namespace fisherprune::cuda::grad_moments
