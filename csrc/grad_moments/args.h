// From the op's tensors to the kernels' arguments: every check of grad_moments.
#pragma once

#include <vector>

#include "common/args.h"
#include "grad_moments/contract.h"

namespace fisherprune {

constexpr char kOp[] = "grad_moments";

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

inline GradMoments grad_moments_args(const Tensor& input, const Tensor& grad,
                                     const Tensor& sum, const Tensor& sum_sq,
                                     const std::vector<int64_t>& stride,
                                     const std::vector<int64_t>& padding,
                                     const std::vector<int64_t>& dilation,
                                     int64_t groups, int64_t group_size) {
  check_device(kOp, grad, "grad", input);
  check_device(kOp, sum, "sum", input);
  check_device(kOp, sum_sq, "sum_sq", input);
  const View4 a = view_of(kOp, input, "input", "[N, C, H, W]");
  const View4 d = view_of(kOp, grad, "grad", "[N, O, P, Q]");
  check_pair(kOp, stride, "stride", 1);
  check_pair(kOp, padding, "padding", 0);
  check_pair(kOp, dilation, "dilation", 1);
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
  h.check_extents(kOp), w.check_extents(kOp);
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
  check_apart(kOp, sum, "sum", sum_sq, "sum_sq");
  check_apart(kOp, sum, "sum", input, "input");
  check_apart(kOp, sum, "sum", grad, "grad");
  check_apart(kOp, sum_sq, "sum_sq", input, "input");
  check_apart(kOp, sum_sq, "sum_sq", grad, "grad");
  return args;
}

}  // namespace fisherprune
