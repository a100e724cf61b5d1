// channel_affine_backward: the gradients of an affine map of each channel, as BatchNorm
// with running statistics is one, free of torch.
//
//     y[n, c, p] = (x[n, c, p] - mean[c]) * scale[c] * weight[c] + bias[c]
//
// From the gradient d of y to that of x, d * factor[c] with factor = scale * weight,
// and to those of weight and bias for each sample: scale[c] * sum_p d (x - mean[c]) and
// sum_p d. Tensors are float32. Input and gradients lie in memory as [N, C, P], or as
// [N, P, C] with the channels last.
#pragma once

#include <cstdint>

namespace fisherprune {

struct ChannelAffineBackward {
  int64_t samples, channels, positions;  // N, C, P
  bool channels_last;
  const float *grad, *input;           // [N, C, P]
  const float *mean, *scale, *factor;  // [C]
  float* input_grad;                   // [N, C, P]
  float *weight_grad, *bias_grad;      // [N, C]
};

}  // namespace fisherprune
