// From the ops' tensors to the kernels' arguments: every check of batch_norm.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "batch_norm/contract.h"
#include "common/args.h"
#include "common/layout.h"

namespace fisherprune {

using MaybeTensor = std::optional<Tensor>;

// Axes from the slowest to the fastest in memory, without those of one entry.
inline std::vector<int64_t> axes_of(const Tensor& t) {
  std::vector<int64_t> axes;
  for (int64_t i = 0; i < t.dim(); ++i)
    if (t.size(i) != 1) axes.push_back(i);
  std::stable_sort(axes.begin(), axes.end(),
                   [&](int64_t a, int64_t b) { return t.stride(a) > t.stride(b); });
  return axes;
}

inline BatchNormShape batch_norm_shape(const char* op, const Tensor& input) {
  check(input.dim() >= 2, op, ": input must have shape [N, C, *], got ",
        shape_of(input));
  check(input.numel() > 0, op, ": input must have at least one entry, got ",
        shape_of(input));
  const Dtype dtype = dtype_of(op, input, "input");
  check(dtype != Dtype::float16, op, ": input must be float32 or bfloat16, got Half");
  BatchNormShape s{1, input.size(1), 1, dtype};
  bool slower = input.size(1) != 1;  // a single channel's entries are one row
  for (const int64_t axis : axes_of(input)) {
    if (axis == 1)
      slower = false;
    else
      (slower ? s.outer : s.inner) *= input.size(axis);
  }
  return s;
}

inline const float* channel_values(const char* op, const Tensor& t, const char* name,
                                   const Tensor& input) {
  check_device(op, t, name, input);
  check(t.dim() == 1 && t.size(0) == input.size(1), op, ": ", name,
        " must have shape [", input.size(1), "], got ", shape_of(t));
  check(t.scalar_type() == ScalarType::Float && t.is_contiguous(), op, ": ", name,
        " must be a contiguous float32 tensor");
  return static_cast<const float*>(t.data_ptr());
}

inline const float* channel_values(const char* op, const MaybeTensor& t,
                                   const char* name, const Tensor& input) {
  return t ? channel_values(op, *t, name, input) : nullptr;
}

}  // namespace fisherprune
