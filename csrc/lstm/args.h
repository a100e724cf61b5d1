// From the ops' tensors to the kernels' arguments: every check of lstm.
#pragma once

#include <vector>

#include "common/args.h"
#include "lstm/contract.h"

namespace fisherprune {

// What a tensor must be, for messages.
inline std::string sizes_in_words(const std::vector<int64_t>& size) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < size.size(); ++i) text << (i ? ", " : "") << size[i];
  text << ']';
  return text.str();
}

// The entries of a contiguous float32 tensor of this size.
inline float* lstm_floats(const char* op, const Tensor& t, const char* name,
                          const std::vector<int64_t>& size) {
  bool same = t.dim() == static_cast<int64_t>(size.size());
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == size[i];
  check(same, op, ": ", name, " must have shape ", sizes_in_words(size), ", got ",
        shape_of(t));
  check(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.is_cpu(), op,
        ": ", name, " must be a contiguous float32 tensor on the CPU, got ",
        torch::headeronly::toString(t.scalar_type()), " on ", device_of(t));
  return static_cast<float*>(t.data_ptr());
}

// Of a tensor [N, T, k * H].
inline LstmShape lstm_shape(const char* op, const Tensor& t, const char* name,
                            int64_t k) {
  check(t.dim() == 3 && t.size(2) % k == 0, op, ": ", name, " must have shape [N, T, ",
        k == 1 ? "" : "4", "H], got ", shape_of(t));
  return {t.size(0), t.size(1), t.size(2) / k};
}

}  // namespace fisherprune
