// From the ops' tensors to the kernels' arguments: every check of max_pool2d.
#pragma once

#include <vector>

#include "common/layout.h"
#include "max_pool/contract.h"

namespace fisherprune {

// Where a window would begin behind image and padding before it there is none.
inline int64_t pooled(int64_t size, int64_t kernel, int64_t stride, int64_t pad,
                      bool ceil_mode) {
  const int64_t span = size + 2 * pad - kernel;
  const int64_t steps = (span + (ceil_mode ? stride - 1 : 0)) / stride;
  return steps * stride >= size + pad ? steps : steps + 1;
}

inline MaxPoolShape max_pool_shape(const char* op, Dtype dtype,
                                   const std::vector<int64_t>& size,
                                   const std::vector<int64_t>& kernel,
                                   const std::vector<int64_t>& stride,
                                   const std::vector<int64_t>& padding,
                                   bool ceil_mode) {
  check_pair(op, kernel, "kernel", 1);
  check_pair(op, stride, "stride", 1);
  check_pair(op, padding, "padding", 0);
  check(kernel[0] <= kMostPlaces && kernel[1] <= kMostPlaces / kernel[0], op,
        ": kernel must have at most ", kMostPlaces, " places, got ", kernel[0], " x ",
        kernel[1]);
  check(dtype != Dtype::float16, op, ": entries must be float32 or bfloat16, got Half");
  for (int i = 0; i < 2; ++i) {
    check(padding[i] <= kernel[i] / 2, op, ": padding must be at most half of kernel, ",
          kernel[i], ", got ", padding[i]);
    check(stride[i] <= kMostExtent && size[i + 2] <= kMostExtent, op,
          ": stride must be at most ", kMostExtent, ", got ", stride[i]);
    check(size[i + 2] >= 1, op, ": input must have at least one row and column");
    check(size[i + 2] + 2 * padding[i] >= kernel[i], op,
          ": kernel must fit into the padded input, ", size[i + 2] + 2 * padding[i],
          ", got ", kernel[i]);
  }
  return {size[0],
          size[1],
          size[2],
          size[3],
          pooled(size[2], kernel[0], stride[0], padding[0], ceil_mode),
          pooled(size[3], kernel[1], stride[1], padding[1], ceil_mode),
          kernel[0],
          kernel[1],
          stride[0],
          stride[1],
          padding[0],
          padding[1],
          dtype};
}

// A new tensor of these sizes whose samples are innermost.
inline Tensor new_samples_innermost(const Tensor& like,
                                    const std::vector<int64_t>& size,
                                    ScalarType dtype) {
  const Tensor memory =
      torch::stable::new_empty(like, {size[1], size[2], size[3], size[0]}, dtype);
  return torch::stable::permute(memory, {3, 0, 1, 2});
}

// The tensor, or a copy whose samples are innermost.
inline Tensor samples_innermost(const Tensor& t) {
  const int64_t stride[] = {1, t.size(2) * t.size(3) * t.size(0), t.size(3) * t.size(0),
                            t.size(0)};
  bool innermost = true;
  for (int i = 0; i < 4; ++i)
    innermost = innermost && (t.size(i) == 1 || t.stride(i) == stride[i]);
  if (innermost) return t;
  Tensor copy = new_samples_innermost(t, {t.size(0), t.size(1), t.size(2), t.size(3)},
                                      t.scalar_type());
  return torch::stable::copy_(copy, t);
}

}  // namespace fisherprune
