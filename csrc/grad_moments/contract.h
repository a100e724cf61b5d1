// grad_moments: the contract, free of torch: tests compile the kernels alone.
//
// A layer with input a and output gradient d, group j of g consecutive samples (the
// last group may be smaller and is averaged over its own size |j|):
//
//     G_j[o, c, y, x] =
//         1 / |j| * sum_{n in j} sum_t d[n, o, t] * a[n, c', h(t, y), w(t, x)]
//
//     sum    += sum_j G_j
//     sum_sq += sum_j G_j * G_j
//
// with t = (p, q) the output position, c' = c + (o's convolution group) * C / groups,
// h = p * stride_h - pad_h + y * dilation_h (zero outside of the image), w likewise.
// A linear layer with T positions is the 1 x 1 convolution of a [N, in, T, 1] view.
// The order of the samples decides which of them form a group.
//
// The same call has the same result, bit for bit: the order of the additions does not
// depend on the number of threads. It depends on the shape, the kind of device, strides
// and alignment, which decide on the kernel; and on the values where a kernel must
// judge its own rounding errors.
#pragma once

#include <cstdint>

#include "common/view.h"

namespace fisherprune {

struct ConvShape {
  int64_t samples;                         // N
  int64_t channels, height, width;         // of the input
  int64_t outputs, out_height, out_width;  // of the output gradient
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t groups;      // of the convolution
  int64_t group_size;  // samples averaged before squaring

  int64_t group_channels() const { return channels / groups; }
  int64_t group_outputs() const { return outputs / groups; }
  int64_t patch() const { return group_channels() * kernel_h * kernel_w; }
  int64_t positions() const { return out_height * out_width; }
};

struct GradMoments {
  ConvShape shape;
  View4 input;    // [N, C, H, W]
  View4 grad;     // [N, O, P, Q]
  float* sum;     // [O, C / groups, kernel_h, kernel_w], contiguous
  float* sum_sq;  // the same
};

}  // namespace fisherprune
