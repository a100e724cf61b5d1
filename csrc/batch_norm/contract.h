// batch_norm and its gradient: the contract, free of torch.
//
// Per channel c, over its `count` entries x_i = input[a, c, b]:
//
//     mean = sum_i x_i / count,  scale = 1 / sqrt(sum_i (x_i - mean)^2 / count + eps)
//     xhat_i = (x_i - mean) * scale
//     output_i = relu?(xhat_i * weight + bias + residual_i?)
//
// and with g_i the gradient at output_i, zero where relu and output_i <= 0,
//
//     grad_bias = sum_i g_i,  grad_weight = sum_i g_i * xhat_i
//     grad_input_i = weight * scale * (g_i - (grad_bias + xhat_i * grad_weight) /
//     count) grad_residual_i = g_i
//
// There is at least one entry. A dense tensor of any layout lies in memory as [outer,
// channels, inner]: [1, C, H*W*N] with samples innermost, [N, C, H*W] by default,
// [N*H*W, C, 1] in channels_last. All tensors of one call lie alike. Entries are
// float32 or bfloat16, the arithmetic is float32, and double over the chunks of a
// channel.
//
// The same call has the same result, bit for bit, whatever the number of threads.
#pragma once

#include <cstdint>

#include "common/view.h"

namespace fisherprune {

struct BatchNormShape {
  int64_t outer, channels, inner;
  Dtype dtype;

  int64_t count() const { return outer * inner; }  // entries of a channel
};

struct BatchNorm {
  BatchNormShape shape;
  const void* input;
  const void* residual;  // or null
  const float* weight;   // [channels], or null: 1
  const float* bias;     // [channels], or null: 0
  double eps;
  bool relu;
  void* output;
  float *mean, *scale;  // [channels]
};

struct BatchNormBackward {
  BatchNormShape shape;
  const void* grad;
  const void* input;
  const void* output;   // null: no relu
  const float* weight;  // [channels], or null: 1
  const float *mean, *scale;
  void* grad_input;
  void* grad_residual;  // or null
  float *grad_weight, *grad_bias;
};

}  // namespace fisherprune
