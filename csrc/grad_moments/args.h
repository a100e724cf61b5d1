// From the op's tensors to the kernels' arguments: every check of grad_moments.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "common/check.h"
#include "grad_moments/contract.h"

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

inline Dtype dtype_of(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::Half) return Dtype::float16;
  if (type == ScalarType::BFloat16) return Dtype::bfloat16;
  check(type == ScalarType::Float, "grad_moments: ", name,
        " must be float32, float16 or bfloat16, got ",
        torch::headeronly::toString(type));
  return Dtype::float32;
}

inline std::string device_of(const Tensor& t) {
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "cpu";
}

inline void check_device(const Tensor& t, const char* name, const Tensor& input) {
  check(device_of(t) == device_of(input), "grad_moments: ", name,
        " must be on the device of input, ", device_of(input), ", got ", device_of(t));
}

inline View4 view_of(const Tensor& t, const char* name, const char* letters) {
  check(t.dim() == 4, "grad_moments: ", name, " must have shape ", letters, ", got ",
        shape_of(t));
  return {t.data_ptr(),
          dtype_of(t, name),
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

inline void check_apart(const Tensor& a, const char* name, const Tensor& b,
                        const char* other) {
  const auto [a0, a1] = extent_of(a);
  const auto [b0, b1] = extent_of(b);
  check(a0 >= b1 || b0 >= a1 || a0 == a1 || b0 == b1, "grad_moments: ", name,
        " must not share memory with ", other);
}

inline float* accumulator_of(const Tensor& t, const char* name, const ConvShape& s) {
  const bool fits = t.dim() == 4 && t.size(0) == s.outputs &&
                    t.size(1) == s.group_channels() && t.size(2) == s.kernel_h &&
                    t.size(3) == s.kernel_w;
  check(fits, "grad_moments: ", name, " must have shape [", s.outputs, ", ",
        s.group_channels(), ", ", s.kernel_h, ", ", s.kernel_w, "], got ", shape_of(t));
  check(t.scalar_type() == ScalarType::Float && t.is_contiguous(),
        "grad_moments: ", name, " must be a contiguous float32 tensor");
  return static_cast<float*>(t.data_ptr());
}

inline void check_pair(const std::vector<int64_t>& pair, const char* name,
                       int64_t least) {
  check(pair.size() == 2 && pair[0] >= least && pair[1] >= least,
        "grad_moments: ", name, " must be two integers of at least ", least);
}

// Up to here sums and products of an axis stay far within 64 bits.
constexpr int64_t kMostExtent = int64_t{1} << 60;

// One axis of a convolution.
struct Axis {
  int64_t size, kernel, stride, pad, dilation;

  // What a sum or product of these must not exceed is checked before it is computed.
  void check_extents() const {
    check(size <= kMostExtent && pad <= (kMostExtent - size) / 2,
          "grad_moments: padding must leave at most ", kMostExtent,
          " rows and columns of the padded input, got ", pad, " on both sides of ",
          size);
    check(kernel <= 1 || dilation <= kMostExtent / (kernel - 1),
          "grad_moments: dilation * (kernel - 1) must be at most ", kMostExtent,
          ", got ", dilation, " * ", kernel - 1);
  }

  int64_t padded() const { return size + 2 * pad; }

  int64_t positions() const {
    const int64_t span = padded() - dilation * (kernel - 1) - 1;
    return span < 0 ? 0 : span / stride + 1;
  }

  // A stride longer than the padded input leads to one position, whatever its length.
  int64_t bounded_stride() const { return std::min(stride, padded() + 1); }
};

inline GradMoments grad_moments_args(const Tensor& input, const Tensor& grad,
                                     const Tensor& sum, const Tensor& sum_sq,
                                     const std::vector<int64_t>& stride,
                                     const std::vector<int64_t>& padding,
                                     const std::vector<int64_t>& dilation,
                                     int64_t groups, int64_t group_size) {
  check_device(grad, "grad", input);
  check_device(sum, "sum", input);
  check_device(sum_sq, "sum_sq", input);
  const View4 a = view_of(input, "input", "[N, C, H, W]");
  const View4 d = view_of(grad, "grad", "[N, O, P, Q]");
  check_pair(stride, "stride", 1);
  check_pair(padding, "padding", 0);
  check_pair(dilation, "dilation", 1);
  check(sum.dim() == 4, "grad_moments: sum must have shape [O, C / groups, Y, X], got ",
        shape_of(sum));
  check(group_size >= 1, "grad_moments: group_size must be at least 1, got ",
        group_size);
  check(groups >= 1 && input.size(1) % groups == 0 && grad.size(1) % groups == 0,
        "grad_moments: groups must divide the channels of input and grad, got groups ",
        groups, " for ", input.size(1), " and ", grad.size(1));
  check(input.size(0) == grad.size(0),
        "grad_moments: grad must have as many samples as ", "input, ", input.size(0),
        ", got ", grad.size(0));
  const Axis h{input.size(2), sum.size(2), stride[0], padding[0], dilation[0]};
  const Axis w{input.size(3), sum.size(3), stride[1], padding[1], dilation[1]};
  h.check_extents(), w.check_extents();
  const ConvShape s{input.size(0),
                    input.size(1),
                    h.size,
                    w.size,
                    grad.size(1),
                    grad.size(2),
                    grad.size(3),
                    h.kernel,
                    w.kernel,
                    h.bounded_stride(),
                    w.bounded_stride(),
                    h.pad,
                    w.pad,
                    h.dilation,
                    w.dilation,
                    groups,
                    group_size};
  const int64_t p = h.positions(), q = w.positions();
  check(s.out_height == p && s.out_width == q, "grad_moments: grad must have shape [",
        s.samples, ", O, ", p, ", ", q, "] for this input and kernel, got ",
        shape_of(grad));
  GradMoments args{s, a, d, accumulator_of(sum, "sum", s),
                   accumulator_of(sum_sq, "sum_sq", s)};
  check_apart(sum, "sum", sum_sq, "sum_sq");
  check_apart(sum, "sum", input, "input");
  check_apart(sum, "sum", grad, "grad");
  check_apart(sum_sq, "sum_sq", input, "input");
  check_apart(sum_sq, "sum_sq", grad, "grad");
  return args;
}

}  // namespace fisherprune
