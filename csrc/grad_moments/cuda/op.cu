// grad_moments on CUDA: checks, workspace, launches.
#include "grad_moments/args.h"

#include <torch/csrc/stable/library.h>

#include "common/cuda/op.cuh"
#include "facts.h"
#include "grad_moments/cuda/launch.cuh"
#include "grad_moments/cuda/wgmma_switch.h"

namespace fisherprune::cuda::grad_moments {
namespace {

bool may_use_wgmma() {
  if (!wants_wgmma()) return false;
  check_wgmma(fisherprune_facts()->cuda_archs,
              device_attribute(cudaDevAttrComputeCapabilityMajor),
              device_attribute(cudaDevAttrComputeCapabilityMinor));
  return true;
}

void grad_moments_op(const Tensor& input, const Tensor& grad, const Tensor& sum,
                     const Tensor& sum_sq, std::vector<int64_t> stride,
                     std::vector<int64_t> padding, std::vector<int64_t> dilation,
                     int64_t groups, int64_t group_size, bool allow_tf32) {
  const GradMoments m = grad_moments_args(input, grad, sum, sum_sq, stride, padding,
                                          dilation, groups, group_size);
  if (!has_work(m.shape)) return;
  check_extents(m.shape);
  const DeviceGuard guard(input.get_device_index());
  const GradMomentsPlan plan =
      plan_grad_moments(m, allow_tf32, multiprocessors(), may_use_wgmma());
  const Tensor workspace = torch::stable::new_empty(sum, {plan.workspace});
  run_grad_moments(m, plan, allow_tf32, static_cast<float*>(workspace.data_ptr()),
                   current_stream(input));
}

}  // namespace
}  // namespace fisherprune::cuda::grad_moments

STABLE_TORCH_LIBRARY_IMPL(fisherprune, CUDA, m) {
  m.impl("grad_moments", TORCH_BOX(&fisherprune::cuda::grad_moments::grad_moments_op));
}
