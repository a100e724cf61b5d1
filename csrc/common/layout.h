// Tensors that must lie in memory alike, for ops that read them side by side.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "common/args.h"

namespace fisherprune {

// Whether two tensors of one shape lie in memory alike.
inline bool lie_alike(const Tensor& a, const Tensor& b) {
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) != 1 && a.stride(i) != b.stride(i)) return false;
  return true;
}

// The tensor, or a copy that lies as `model`, which is dense.
inline Tensor lying_as(const Tensor& model, const Tensor& t) {
  if (lie_alike(model, t)) return t;
  Tensor copy = torch::stable::empty_like(model);
  return torch::stable::copy_(copy, t);
}

inline void check_like(const char* op, const Tensor& t, const char* name,
                       const Tensor& input) {
  check_device(op, t, name, input);
  bool same = t.dim() == input.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == input.size(i);
  check(same, op, ": ", name, " must have the shape of input, ", shape_of(input),
        ", got ", shape_of(t));
  check(t.scalar_type() == input.scalar_type(), op, ": ", name,
        " must have the dtype of input, ",
        torch::headeronly::toString(input.scalar_type()), ", got ",
        torch::headeronly::toString(t.scalar_type()));
}

}  // namespace fisherprune
