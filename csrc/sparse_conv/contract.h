// sparse_conv2d and its gradients: the contract, free of torch.
//
// A weight w[o, c, y, x] of which `count` entries are kept, in the order of the weight
// as it lies in memory: values[i] is entry columns[i] of the output channel o with
// rows[o] <= i < rows[o + 1], and columns[i] = (c * kernel_h + y) * kernel_w + x counts
// within that channel.
//
//     output[n, o, p, q] = bias[o] + residual[n, o, p, q]
//                          + sum_i values[i] * input[n, c', h, w], then a ReLU if asked
//     grad_input[n, c', h, w] = sum_{i, p, q} values[i] * grad[n, o, p, q]
//     grad_values[i] = sum_{n, p, q} grad[n, o, p, q] * input[n, c', h, w]
//
// with c' = c + (o's convolution group) * C / groups, h = p * stride_h - pad_h +
// y * dilation_h (zero outside of the image), w likewise. Inputs have any strides; what
// is returned has its samples innermost: it lies in memory as [O, P, Q, N].
//
// All is computed in float32. An output or a gradient of the input has the dtype that
// result_dtype says; of bfloat16 it is the float32 result, rounded once, to the
// nearest.
//
// The same call has the same result, bit for bit, whatever the number of threads.
#pragma once

#include <cstdint>

#include "common/view.h"

namespace fisherprune {

struct SparseConvShape {
  int64_t samples;                         // N
  int64_t channels, height, width;         // of the input
  int64_t outputs, out_height, out_width;  // of the output
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t groups;

  int64_t group_channels() const { return channels / groups; }
  int64_t group_outputs() const { return outputs / groups; }
};

// Which entries of the weight are kept; columns ascend within a row.
struct Pattern {
  const int32_t* rows;     // [outputs + 1]
  const int32_t* columns;  // [count]
  int64_t count;
};

// Of what is computed from an image of that dtype.
inline Dtype result_dtype(Dtype image) {
  return image == Dtype::bfloat16 ? image : Dtype::float32;
}

// What an output is made of beside the convolution.
struct Epilogue {
  const float* bias;     // [O], or null
  const void* residual;  // is as the output, and lies in memory so, or null
  bool relu;
};

}  // namespace fisherprune
