// grad_moments of large layers with one position a sample, such as plain linear layers,
// and groups of one. There G = d a, so the moments are two products over the samples:
// of d and a, and of their squares (which must not leave the range of float32). The
// kernels see one sample that has all samples as its positions, and so they close one
// group only.
#pragma once

#include "common/integers.h"
#include "grad_moments/contract.h"
#include "grad_moments/cuda/load.cuh"
#include "grad_moments/cuda/tuning.h"

namespace fisherprune::cuda::grad_moments {

inline bool are_products(const ConvShape& s) {
  return s.height == 1 && s.width == 1 && s.positions() == 1 && s.kernel_h == 1 &&
         s.kernel_w == 1 && s.pad_h == 0 && s.pad_w == 0 && s.group_size == 1 &&
         s.outputs * s.patch() >= PRODUCTS_LEAST;
}

// The op as that of one sample, with all samples as its positions; only its sum.
inline GradMoments samples_as_positions(GradMoments m) {
  ConvShape& s = m.shape;
  s.width = s.out_width = s.samples;
  s.samples = s.stride_h = s.stride_w = 1;
  m.input.stride[3] = m.input.stride[0];
  m.grad.stride[3] = m.grad.stride[0];
  m.sum_sq = nullptr;
  return m;
}

inline int64_t square_floats(const ConvShape& s) {
  return s.samples * (s.channels + s.outputs);
}

constexpr int SQUARE_THREADS = 256;

// Each thread squares one value of an operand with one position, [samples, channels].
// It reads the operand once, and writes a float for each value.
__global__ void __launch_bounds__(SQUARE_THREADS)
    square_samples(const View4 view, int64_t channels, int64_t size, float* squares) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * SQUARE_THREADS + threadIdx.x;
  if (i >= size) return;
  const int64_t at = i / channels * view.stride[0] + i % channels * view.stride[1];
  float value;
  if (view.dtype == Dtype::float32) {
    value = static_cast<const float*>(view.data)[at];
  } else {
    const uint16_t bits = static_cast<const uint16_t*>(view.data)[at];
    value = view.dtype == Dtype::float16 ? to_float<Dtype::float16>(bits)
                                         : to_float<Dtype::bfloat16>(bits);
  }
  squares[i] = value * value;
}

// Fills `squares` and returns where they lie.
inline View4 launch_squares(const View4& view, int64_t samples, int64_t channels,
                            float* squares, Stream stream) {
  const int64_t size = samples * channels;
  const int64_t blocks = ceil_div(size, SQUARE_THREADS);
  launch(square_samples, dim3(static_cast<unsigned>(blocks)), SQUARE_THREADS, 0, stream,
         view, channels, size, squares);
  return {squares, Dtype::float32, {channels, 1, 1, 1}};
}

// The op's second product.
inline GradMoments squares_of(GradMoments m, float* memory, Stream stream) {
  const ConvShape& s = m.shape;
  m.input = launch_squares(m.input, s.samples, s.channels, memory, stream);
  m.grad = launch_squares(m.grad, s.samples, s.outputs, memory + s.samples * s.channels,
                          stream);
  m.sum = m.sum_sq;
  return m;
}

}  // namespace fisherprune::cuda::grad_moments
