// From tensors to what kernels take, for all ops: `op` begins every message.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/view.h"

namespace fisherprune {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

inline Dtype dtype_of(const char* op, const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::Half) return Dtype::float16;
  if (type == ScalarType::BFloat16) return Dtype::bfloat16;
  check(type == ScalarType::Float, op, ": ", name,
        " must be float32, float16 or bfloat16, got ",
        torch::headeronly::toString(type));
  return Dtype::float32;
}

inline std::string device_of(const Tensor& t) {
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "cpu";
}

inline void check_device(const char* op, const Tensor& t, const char* name,
                         const Tensor& input) {
  check(device_of(t) == device_of(input), op, ": ", name,
        " must be on the device of input, ", device_of(input), ", got ", device_of(t));
}

inline View4 view_of(const char* op, const Tensor& t, const char* name,
                     const char* letters) {
  check(t.dim() == 4, op, ": ", name, " must have shape ", letters, ", got ",
        shape_of(t));
  return {t.data_ptr(),
          dtype_of(op, t, name),
          {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}};
}

// The bytes that a tensor's entries lie in: [first, last).
inline std::pair<const char*, const char*> extent_of(const Tensor& t) {
  const char* first = static_cast<const char*>(t.data_ptr());
  int64_t last = 1;
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (t.size(i) == 0) return {first, first};
    last += (t.size(i) - 1) * t.stride(i);
  }
  return {first, first + last * t.element_size()};
}

inline void check_apart(const char* op, const Tensor& a, const char* name,
                        const Tensor& b, const char* other) {
  const auto [a0, a1] = extent_of(a);
  const auto [b0, b1] = extent_of(b);
  check(a0 >= b1 || b0 >= a1 || a0 == a1 || b0 == b1, op, ": ", name,
        " must not share memory with ", other);
}

inline void check_pair(const char* op, const std::vector<int64_t>& pair,
                       const char* name, int64_t least) {
  check(pair.size() == 2 && pair[0] >= least && pair[1] >= least, op, ": ", name,
        " must be two integers of at least ", least);
}

// Up to here sums and products of an axis stay far within 64 bits.
constexpr int64_t kMostExtent = int64_t{1} << 60;

// One axis of a convolution.
struct Axis {
  int64_t size, kernel, stride, pad, dilation;

  // What a sum or product of these must not exceed is checked before it is computed.
  void check_extents(const char* op) const {
    check(size <= kMostExtent && pad <= (kMostExtent - size) / 2, op,
          ": padding must leave at most ", kMostExtent,
          " rows and columns of the padded input, got ", pad, " on both sides of ",
          size);
    check(kernel <= 1 || dilation <= kMostExtent / (kernel - 1), op,
          ": dilation * (kernel - 1) must be at most ", kMostExtent, ", got ", dilation,
          " * ", kernel - 1);
  }

  int64_t padded() const { return size + 2 * pad; }

  int64_t positions() const {
    const int64_t span = padded() - dilation * (kernel - 1) - 1;
    return span < 0 ? 0 : span / stride + 1;
  }

  // A stride longer than the padded input leads to one position, whatever its length.
  int64_t bounded_stride() const { return std::min(stride, padded() + 1); }
};

}  // namespace fisherprune
