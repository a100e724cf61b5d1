// What kernels read: tensors of four axes, free of torch.
#pragma once

#include <cstdint>

namespace fisherprune {

enum class Dtype { float32, float16, bfloat16 };

// A strided, read-only NCHW view; strides count elements and may be 0 or overlap.
struct View4 {
  const void* data;
  Dtype dtype;
  int64_t stride[4];
};

}  // namespace fisherprune
