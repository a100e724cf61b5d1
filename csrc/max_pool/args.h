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
    const int64_t beyond = ceil_mode ? stride[i] - 1 : 0;
    check(size[i + 2] + 2 * padding[i] + beyond >= kernel[i], op,
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

// The strides of memory in the order [C, H, W, N], seen as [N, C, H, W].
inline std::vector<int64_t> innermost_strides(const std::vector<int64_t>& size) {
  return {1, size[2] * size[3] * size[0], size[3] * size[0], size[0]};
}

// A new tensor of these sizes whose samples are innermost; no view of another one,
// because autograd forbids to change views that an op returns.
inline Tensor new_innermost(const Tensor& like, const std::vector<int64_t>& size,
                            int32_t dtype) {
  const std::vector<int64_t> strides = innermost_strides(size);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      4, size.data(), strides.data(), dtype, aoti_torch_device_type_cpu(),
      like.get_device_index(), &handle));
  return Tensor(handle);
}

inline int32_t dtype_number(Dtype dtype) {
  return dtype == Dtype::float32 ? aoti_torch_dtype_float32()
                                 : aoti_torch_dtype_bfloat16();
}

// The tensor, or a copy whose samples are innermost, of a dtype that has this number.
inline Tensor samples_innermost(const Tensor& t, int32_t dtype) {
  const std::vector<int64_t> size{t.size(0), t.size(1), t.size(2), t.size(3)};
  const std::vector<int64_t> strides = innermost_strides(size);
  bool innermost = true;
  for (int i = 0; i < 4; ++i)
    innermost = innermost && (size[i] == 1 || t.stride(i) == strides[i]);
  if (innermost) return t;
  Tensor copy = new_innermost(t, size, dtype);
  return torch::stable::copy_(copy, t);
}

}  // namespace fisherprune
