// The sparse ops on the CPU: checks, memory, and torch's threads for what knows no
// torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "common/cpu/op.h"
#include "common/cpu/pages.h"
#include "common/layout.h"
#include "sparse_conv/args.h"
#include "sparse_conv/cpu/core.h"

namespace fisherprune::cpu::sparse_conv {
namespace {

using Ints = std::vector<int64_t>;

Machine machine() {
  static const Parallel parallel = in_parallel;
  return {cpu_capability(), parallel, torch::stable::get_num_threads()};
}

// Memory in the order [C, H, W, N], seen as [N, C, H, W]; no view of another tensor,
// because autograd forbids to change views that an op returns, as ReLU in place does.
Tensor new_innermost(const Tensor& like, const Ints& size, Dtype dtype) {
  const Ints strides{1, size[2] * size[3] * size[0], size[3] * size[0], size[0]};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      4, size.data(), strides.data(),
      dtype == Dtype::float32 ? aoti_torch_dtype_float32()
                              : aoti_torch_dtype_bfloat16(),
      aoti_torch_device_type_cpu(), like.get_device_index(), &handle));
  const Tensor t(handle);
  const int64_t bytes = t.numel() * static_cast<int64_t>(t.element_size());
  prefer_large_pages({{t.data_ptr(), bytes}}, in_parallel);
  return t;
}

Tensor sparse_conv2d(const Tensor& input, const Tensor& values, const Tensor& rows,
                     const Tensor& columns, const std::optional<Tensor>& bias,
                     const Ints& kernel, const Ints& stride, const Ints& padding,
                     const Ints& dilation, int64_t groups, bool relu,
                     const std::optional<Tensor>& residual) {
  constexpr char op[] = "sparse_conv2d";
  const View4 x = view_of(op, input, "input", "[N, C, H, W]");
  check(rows.numel() > 0, op, ": rows must hold O + 1 numbers, got none");
  const SparseConvShape s =
      sparse_conv_shape(op, sizes_of(input), rows.numel() - 1,
                        {kernel, stride, padding, dilation, groups});
  const Pattern pattern = pattern_of(op, rows, columns, s, input);
  const float* const w = floats_of(op, values, "values", pattern.count, input);
  const float* const b =
      bias ? floats_of(op, *bias, "bias", s.outputs, input) : nullptr;
  const Tensor result = new_innermost(
      values, {s.samples, s.outputs, s.out_height, s.out_width}, result_dtype(x.dtype));
  std::optional<Tensor> before;
  if (residual) before = lying_as(result, checked_residual(op, *residual, s, result));
  const Epilogue epilogue{b, before ? before->data_ptr() : nullptr, relu};
  output(s, x, pattern, w, epilogue, result.data_ptr(), machine());
  return result;
}

Tensor sparse_conv2d_input(Ints input_size, const Tensor& values, const Tensor& rows,
                           const Tensor& columns, const Tensor& grad, Ints kernel,
                           Ints stride, Ints padding, Ints dilation, int64_t groups) {
  constexpr char op[] = "sparse_conv2d_input";
  const View4 g = view_of(op, grad, "grad", "[N, O, P, Q]");
  check(input_size.size() == 4, op, ": input_size must be four integers");
  check(rows.numel() > 0, op, ": rows must hold O + 1 numbers, got none");
  const SparseConvShape s = sparse_conv_shape(
      op, input_size, rows.numel() - 1, {kernel, stride, padding, dilation, groups});
  check_grad(op, grad, s);
  const Pattern pattern = pattern_of(op, rows, columns, s, grad);
  const float* const w = floats_of(op, values, "values", pattern.count, grad);
  const Tensor result = new_innermost(values, input_size, result_dtype(g.dtype));
  input_gradient(s, g, pattern, w, result.data_ptr(), machine());
  return result;
}

Tensor sparse_conv2d_weight(const Tensor& input, const Tensor& rows,
                            const Tensor& columns, const Tensor& grad, Ints kernel,
                            Ints stride, Ints padding, Ints dilation, int64_t groups) {
  constexpr char op[] = "sparse_conv2d_weight";
  const View4 x = view_of(op, input, "input", "[N, C, H, W]");
  const View4 g = view_of(op, grad, "grad", "[N, O, P, Q]");
  check_device(op, grad, "grad", input);
  check(rows.numel() > 0, op, ": rows must hold O + 1 numbers, got none");
  const SparseConvShape s =
      sparse_conv_shape(op, sizes_of(input), rows.numel() - 1,
                        {kernel, stride, padding, dilation, groups});
  check_grad(op, grad, s);
  const Pattern pattern = pattern_of(op, rows, columns, s, input);
  const Tensor result =
      torch::stable::new_empty(input, Ints{pattern.count}, ScalarType::Float);
  values_gradient(s, x, g, pattern, static_cast<float*>(result.data_ptr()), machine());
  return result;
}

}  // namespace
}  // namespace fisherprune::cpu::sparse_conv

STABLE_TORCH_LIBRARY_IMPL(fisherprune, CPU, m) {
  using namespace fisherprune::cpu::sparse_conv;
  m.impl("sparse_conv2d", TORCH_BOX(&sparse_conv2d));
  m.impl("sparse_conv2d_input", TORCH_BOX(&sparse_conv2d_input));
  m.impl("sparse_conv2d_weight", TORCH_BOX(&sparse_conv2d_weight));
}
