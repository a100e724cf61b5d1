// max_pool2d and its gradient: the contract, free of torch.
//
//     output[n, c, p, q] = max over (y, x) of input[n, c, h, w]
//     h = p * stride_h - pad_h + y,  w = q * stride_w - pad_w + x
//
// over the places of the window that are within the image; there is at least one. The
// index is y * kernel_w + x of the first maximum, or of the last NaN: as PyTorch has
// it. The gradient goes there. All tensors have their samples innermost: they lie in
// memory as [C, H, W, N]; N contiguous images are one of N * C channels. Entries are
// float32 or bfloat16; gradients that meet in an entry of the input are added in
// float32, in the order of the output.
#pragma once

#include <cstdint>

#include "common/view.h"

namespace fisherprune {

constexpr int64_t kMostPlaces = 255;  // of a window: an index is a byte

struct MaxPoolShape {
  int64_t samples, channels, height, width, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  Dtype dtype;
};

struct MaxPool {
  MaxPoolShape shape;
  const void* input;
  void* output;
  uint8_t* index;
};

struct MaxPoolBackward {
  MaxPoolShape shape;
  const void* grad;
  const uint8_t* index;
  void* grad_input;
};

}  // namespace fisherprune
