// Which operands suit the kernel of layers without taps, and where their positions lie.
#pragma once

#include "grad_moments/cuda/dense.cuh"
#include "grad_moments/cuda/operands.cuh"

namespace fisherprune::cuda::grad_moments {

// An operand's output positions as rows in memory; strides count values.
struct PositionRows {
  int64_t rows, width;  // of positions
  int64_t row, column;  // from row to row, from position to position

  bool are_vectors(const View4& v) const {
    return rows == 1 && column == 1 && has_pieces(v, 0, QUAD_BYTES / size_of(v.dtype));
  }
  // Whether each copy of 4 bytes has positions of one row.
  bool are_words(const View4& v) const {
    const int64_t word = WORD / size_of(v.dtype);
    return column == 1 ? has_pieces(v, width, word) && (rows == 1 || row % word == 0)
                       : word == 1;
  }
  DensePlaces places(int64_t size) const {
    return {Divider(static_cast<uint32_t>(width)), static_cast<int>(width), row * size,
            column * size};
  }
};

// Positions that are equally far apart are one row.
inline PositionRows position_rows(const View4& v, const ConvShape& s, int64_t step_h,
                                  int64_t step_w) {
  const int64_t rows = s.out_height, width = s.out_width;
  const int64_t row = v.stride[2] * step_h, column = v.stride[3] * step_w;
  if (width == 1) return {1, rows, 0, row};
  if (rows == 1 || row == width * column) return {1, rows * width, 0, column};
  return {rows, width, row, column};
}

inline PositionRows grad_rows(const GradMoments& m) {
  return position_rows(m.grad, m.shape, 1, 1);
}

inline PositionRows input_rows(const GradMoments& m) {
  return position_rows(m.input, m.shape, m.shape.stride_h, m.shape.stride_w);
}

// Whether positions lie side by side; those of the input may have others in between.
inline bool are_dense_planes(const GradMoments& m) {
  const ConvShape& s = m.shape;
  const PositionRows grad = grad_rows(m), input = input_rows(m);
  const int64_t step = s.out_width == 1 ? s.stride_h : s.stride_w;
  return grad.column == 1 && input.column == step && grad.are_words(m.grad) &&
         input.are_words(m.input);
}

inline bool has_no_taps(const ConvShape& s) {
  return s.kernel_h == 1 && s.kernel_w == 1 && s.pad_h == 0 && s.pad_w == 0;
}

inline bool dense_suits(const GradMoments& m) {
  return m.input.dtype == m.grad.dtype && has_no_taps(m.shape) &&
         m.shape.positions() > SLAB / 2 &&
         (are_vectors_of_channels(m) || are_dense_planes(m)) &&
         dense_memory_bytes<DenseTile, DenseShape<Layout::pixels, Dtype::float32>>() <=
             most_shared_bytes();
}

// For operands that suit the kernel.
template <class Action>
auto with_dense_shape(const GradMoments& m, Action action) {
  const auto with_layout = [&](auto dtype) {
    if (are_vectors_of_channels(m))
      return action(DenseShape<Layout::pixels, decltype(dtype)::value>{});
    return action(DenseShape<Layout::planes, decltype(dtype)::value>{});
  };
  switch (m.input.dtype) {
    case Dtype::float16:
      return with_layout(std::integral_constant<Dtype, Dtype::float16>{});
    case Dtype::bfloat16:
      return with_layout(std::integral_constant<Dtype, Dtype::bfloat16>{});
    default:
      return with_layout(std::integral_constant<Dtype, Dtype::float32>{});
  }
}

}  // namespace fisherprune::cuda::grad_moments
