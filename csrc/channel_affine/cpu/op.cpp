// The op channel_affine_backward on the CPU: checks, outputs, call.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "channel_affine/cpu/kernels.h"
#include "common/args.h"
#include "common/cpu/op.h"
#include "common/cpu/pages.h"
#include "common/layout.h"

namespace fisherprune::cpu::channel_affine {
namespace {

constexpr char kOp[] = "channel_affine_backward";

const float* floats_of(const Tensor& t, const char* name) {
  check(t.scalar_type() == ScalarType::Float && t.is_cpu(), kOp, ": ", name,
        " must be a float32 tensor on the CPU, got ",
        torch::headeronly::toString(t.scalar_type()), " on ", device_of(t));
  return static_cast<const float*>(t.data_ptr());
}

const float* channels_of(const Tensor& t, const char* name, int64_t channels) {
  check(t.dim() == 1 && t.size(0) == channels && t.is_contiguous(), kOp, ": ", name,
        " must be contiguous and have one value for each of ", channels,
        " channels, got ", shape_of(t));
  return floats_of(t, name);
}

// Whether the channels of each position lie side by side, and positions in order.
bool has_channels_last(const Tensor& t) {
  int64_t step = t.size(1);
  if (step != 1 && t.stride(1) != 1) return false;
  for (int64_t i = t.dim(); i-- > 0;) {
    if (i == 1) continue;
    if (t.size(i) != 1 && t.stride(i) != step) return false;
    step *= t.size(i);
  }
  return true;
}

std::tuple<Tensor, Tensor, Tensor> op(const Tensor& grad, const Tensor& input,
                                      const Tensor& mean, const Tensor& scale,
                                      const Tensor& factor) {
  check(input.dim() >= 2, kOp, ": input must have shape [N, C, *], got ",
        shape_of(input));
  bool same = grad.dim() == input.dim();
  int64_t positions = 1;
  for (int64_t i = 0; same && i < input.dim(); ++i) {
    same = grad.size(i) == input.size(i);
    if (i > 1) positions *= input.size(i);
  }
  check(same, kOp, ": grad must have the input's shape ", shape_of(input), ", got ",
        shape_of(grad));
  const bool contiguous = input.is_contiguous();
  const bool last = (positions == 1 || !contiguous) && has_channels_last(input);
  check(last || contiguous, kOp,
        ": input must be contiguous or have its channels last");
  floats_of(grad, "grad");
  const Tensor alike = lying_as(input, grad);
  const int64_t samples = input.size(0), channels = input.size(1);
  ChannelAffineBackward call{samples,
                             channels,
                             positions,
                             last,
                             floats_of(alike, "grad"),
                             floats_of(input, "input"),
                             channels_of(mean, "mean", channels),
                             channels_of(scale, "scale", channels),
                             channels_of(factor, "factor", channels),
                             nullptr,
                             nullptr,
                             nullptr};
  const Tensor input_grad = torch::stable::empty_like(input);
  prefer_large_pages({{input_grad.data_ptr(), input_grad.numel() * 4}}, in_parallel);
  const Tensor weight_grad = torch::stable::new_empty(input, {samples, channels});
  const Tensor bias_grad = torch::stable::new_empty(input, {samples, channels});
  call.input_grad = static_cast<float*>(input_grad.data_ptr());
  call.weight_grad = static_cast<float*>(weight_grad.data_ptr());
  call.bias_grad = static_cast<float*>(bias_grad.data_ptr());
  run(call, cpu_capability(), in_parallel);
  return {input_grad, weight_grad, bias_grad};
}

}  // namespace
}  // namespace fisherprune::cpu::channel_affine

STABLE_TORCH_LIBRARY_IMPL(fisherprune, CPU, m) {
  m.impl("channel_affine_backward", TORCH_BOX(&fisherprune::cpu::channel_affine::op));
}
