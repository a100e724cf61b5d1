// The op channel_affine_backward on the CPU: checks, outputs, call.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "channel_affine/cpu/kernels.h"
#include "common/args.h"
#include "common/cpu/op.h"
#include "common/cpu/pages.h"

namespace fisherprune::cpu::channel_affine {
namespace {

constexpr char kOp[] = "channel_affine_backward";

const float* floats_of(const Tensor& t, const char* name) {
  check(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.is_cpu(), kOp,
        ": ", name, " must be a contiguous float32 tensor on the CPU, got ",
        torch::headeronly::toString(t.scalar_type()), " on ", device_of(t));
  return static_cast<const float*>(t.data_ptr());
}

const float* channels_of(const Tensor& t, const char* name, int64_t channels) {
  check(t.dim() == 1 && t.size(0) == channels, kOp, ": ", name,
        " must have one value for each of ", channels, " channels, got ", shape_of(t));
  return floats_of(t, name);
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
  const int64_t samples = input.size(0), channels = input.size(1);
  ChannelAffineBackward call{samples,
                             channels,
                             positions,
                             floats_of(grad, "grad"),
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
