// The op grad_moments on the CPU: checks, and torch's threads for what knows no torch.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/cpu/op.h"
#include "grad_moments/args.h"
#include "grad_moments/cpu/core.h"

namespace fisherprune::cpu::grad_moments {
namespace {

void grad_moments_op(const Tensor& input, const Tensor& grad, const Tensor& sum,
                     const Tensor& sum_sq, std::vector<int64_t> stride,
                     std::vector<int64_t> padding, std::vector<int64_t> dilation,
                     int64_t groups, int64_t group_size, bool /*allow_tf32*/) {
  const GradMoments m = grad_moments_args(input, grad, sum, sum_sq, stride, padding,
                                          dilation, groups, group_size);
  accumulate(m, cpu_capability(), in_parallel, torch::stable::get_num_threads());
}

}  // namespace
}  // namespace fisherprune::cpu::grad_moments

STABLE_TORCH_LIBRARY_IMPL(fisherprune, CPU, m) {
  m.impl("grad_moments", TORCH_BOX(&fisherprune::cpu::grad_moments::grad_moments_op));
}
