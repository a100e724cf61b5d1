// From the ops' tensors to the kernels' arguments: every check of the sparse ops.
#pragma once

#include <optional>
#include <vector>

#include "common/args.h"
#include "sparse_conv/contract.h"

namespace fisherprune {

inline void check_grad(const char* op, const Tensor& grad, const SparseConvShape& s) {
  check(grad.size(0) == s.samples && grad.size(1) == s.outputs &&
            grad.size(2) == s.out_height && grad.size(3) == s.out_width,
        op, ": grad must have shape [", s.samples, ", ", s.outputs, ", ", s.out_height,
        ", ", s.out_width, "], got ", shape_of(grad));
}

inline const Tensor& checked_residual(const char* op, const Tensor& t,
                                      const SparseConvShape& s, const Tensor& result) {
  check_device(op, t, "residual", result);
  check(t.dim() == 4 && t.size(0) == s.samples && t.size(1) == s.outputs &&
            t.size(2) == s.out_height && t.size(3) == s.out_width &&
            t.scalar_type() == result.scalar_type(),
        op, ": residual must be ", torch::headeronly::toString(result.scalar_type()),
        " of shape [", s.samples, ", ", s.outputs, ", ", s.out_height, ", ",
        s.out_width, "], got ", torch::headeronly::toString(t.scalar_type()), " of ",
        shape_of(t));
  return t;
}

// What the three ops say of the convolution.
struct SparseConvGeometry {
  std::vector<int64_t> kernel, stride, padding, dilation;
  int64_t groups;
};

inline SparseConvShape sparse_conv_shape(const char* op,
                                         const std::vector<int64_t>& input,
                                         int64_t outputs, const SparseConvGeometry& g) {
  check_pair(op, g.kernel, "kernel", 1);
  check_pair(op, g.stride, "stride", 1);
  check_pair(op, g.padding, "padding", 0);
  check_pair(op, g.dilation, "dilation", 1);
  check(g.groups >= 1 && input[1] % g.groups == 0 && outputs % g.groups == 0, op,
        ": groups must divide the channels of the input and of the output, got groups ",
        g.groups, " for ", input[1], " and ", outputs);
  const Axis h{input[2], g.kernel[0], g.stride[0], g.padding[0], g.dilation[0]};
  const Axis w{input[3], g.kernel[1], g.stride[1], g.padding[1], g.dilation[1]};
  h.check_extents(op), w.check_extents(op);
  const int64_t p = h.positions(), q = w.positions();
  check(p > 0 && q > 0, op, ": the kernel must fit into the padded input, got ",
        input[2], " x ", input[3], " for a kernel of ", g.kernel[0], " x ",
        g.kernel[1]);
  return {input[0],
          input[1],
          input[2],
          input[3],
          outputs,
          p,
          q,
          h.kernel,
          w.kernel,
          h.bounded_stride(),
          w.bounded_stride(),
          h.pad,
          w.pad,
          h.dilation,
          w.dilation,
          g.groups};
}

inline const int32_t* indices_of(const char* op, const Tensor& t, const char* name,
                                 const Tensor& input) {
  check_device(op, t, name, input);
  check(t.dim() == 1 && t.scalar_type() == ScalarType::Int && t.is_contiguous(), op,
        ": ", name, " must be a contiguous int32 tensor of one axis");
  return static_cast<const int32_t*>(t.data_ptr());
}

// The pattern, each place of which is read: kernels trust it.
inline Pattern pattern_of(const char* op, const Tensor& rows, const Tensor& columns,
                          const SparseConvShape& s, const Tensor& input) {
  const Pattern p{indices_of(op, rows, "rows", input),
                  indices_of(op, columns, "columns", input), columns.numel()};
  check(p.rows[0] == 0 && p.rows[s.outputs] == p.count, op,
        ": rows must begin with 0 and end with the number of columns, ", p.count);
  const int64_t patch = s.group_channels() * s.kernel_h * s.kernel_w;
  for (int64_t o = 0; o < s.outputs; ++o) {
    check(p.rows[o] <= p.rows[o + 1] && p.rows[o + 1] <= p.count, op,
          ": rows must not descend, got ", p.rows[o + 1], " after ", p.rows[o]);
    const int32_t* const first = p.columns + p.rows[o];
    const int64_t count = p.rows[o + 1] - p.rows[o];
    int32_t wrong = count && (first[0] < 0 || first[count - 1] >= patch);
    for (int64_t i = 1; i < count; ++i) wrong |= first[i - 1] >= first[i];
    if (!wrong) continue;
    for (int64_t i = 0, last = -1; i < count; last = first[i++])
      check(last < first[i] && first[i] < patch, op,
            ": columns must ascend in a row, from 0 to below ", patch, ", got ",
            first[i], " after ", last);
  }
  return p;
}

inline const float* floats_of(const char* op, const Tensor& t, const char* name,
                              int64_t size, const Tensor& input) {
  check_device(op, t, name, input);
  check(t.dim() == 1 && t.numel() == size && t.scalar_type() == ScalarType::Float &&
            t.is_contiguous(),
        op, ": ", name, " must be a contiguous float32 tensor of ", size, " numbers");
  return static_cast<const float*>(t.data_ptr());
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  return {t.size(0), t.size(1), t.size(2), t.size(3)};
}

}  // namespace fisherprune
