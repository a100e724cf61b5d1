// The ops batch_norm and batch_norm_backward on the CPU: checks, outputs, calls.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "batch_norm/args.h"
#include "batch_norm/cpu/core.h"
#include "common/cpu/op.h"
#include "common/cpu/pages.h"

namespace fisherprune::cpu::batch_norm {
namespace {

Machine machine() {
  return {cpu_capability(), in_parallel, torch::stable::get_num_threads()};
}

Tensor result_like(const Tensor& input) {
  const Tensor result = torch::stable::empty_like(input);
  prefer_large_pages({{result.data_ptr(), result.numel() * result.element_size()}},
                     in_parallel);
  return result;
}

Tensor new_channels(const Tensor& input) {
  return torch::stable::new_empty(input, {input.size(1)}, ScalarType::Float);
}

float* floats_of(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

std::tuple<Tensor, Tensor, Tensor> batch_norm_op(const Tensor& input,
                                                 MaybeTensor residual,
                                                 MaybeTensor weight, MaybeTensor bias,
                                                 double eps, bool relu) {
  constexpr char op[] = "batch_norm";
  batch_norm_shape(op, input);
  if (residual) check_like(op, *residual, "residual", input);
  check(eps >= 0, op, ": eps must be at least 0, got ", eps);
  const Tensor output = result_like(input);
  const Tensor x = lying_as(output, input);
  const Tensor r = residual ? lying_as(output, *residual) : x;
  const Tensor mean = new_channels(input), scale = new_channels(input);
  forward(
      {batch_norm_shape(op, output), x.data_ptr(), residual ? r.data_ptr() : nullptr,
       channel_values(op, weight, "weight", input),
       channel_values(op, bias, "bias", input), eps, relu, output.data_ptr(),
       floats_of(mean), floats_of(scale)},
      machine());
  return {output, mean, scale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward_op(
    const Tensor& grad, const Tensor& input, const Tensor& output, MaybeTensor weight,
    const Tensor& mean, const Tensor& scale, bool relu, bool residual) {
  constexpr char op[] = "batch_norm_backward";
  batch_norm_shape(op, input);
  check_like(op, grad, "grad", input);
  check_like(op, output, "output", input);
  const Tensor grad_input = result_like(input);
  const Tensor grad_residual =
      residual ? result_like(input)
               : torch::stable::new_empty(input, {0}, input.scalar_type());
  const Tensor g = lying_as(grad_input, grad), x = lying_as(grad_input, input);
  const Tensor y = relu ? lying_as(grad_input, output) : output;
  const Tensor grad_weight = new_channels(input), grad_bias = new_channels(input);
  backward({batch_norm_shape(op, grad_input), g.data_ptr(), x.data_ptr(),
            relu ? y.data_ptr() : nullptr, channel_values(op, weight, "weight", input),
            channel_values(op, mean, "mean", input),
            channel_values(op, scale, "scale", input), grad_input.data_ptr(),
            residual ? grad_residual.data_ptr() : nullptr, floats_of(grad_weight),
            floats_of(grad_bias)},
           machine());
  return {grad_input, grad_residual, grad_weight, grad_bias};
}

}  // namespace
}  // namespace fisherprune::cpu::batch_norm

STABLE_TORCH_LIBRARY_IMPL(fisherprune, CPU, m) {
  m.impl("batch_norm", TORCH_BOX(&fisherprune::cpu::batch_norm::batch_norm_op));
  m.impl("batch_norm_backward",
         TORCH_BOX(&fisherprune::cpu::batch_norm::batch_norm_backward_op));
}
