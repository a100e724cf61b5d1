// The op grad_moments on the CPU: torch's threads for the torch-free core.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <vector>

#include "grad_moments/args.h"
#include "grad_moments/cpu/core.h"

namespace fisherprune {
namespace {

// Every thread takes the next task as it becomes free: which thread does a task never
// matters, and a thread that the system delays does not hold up the others.
void for_each_task(int64_t count, const std::function<void(int64_t)>& body) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) body(i);
  });
}

void grad_moments(const Tensor& input, const Tensor& grad, const Tensor& sum,
                  const Tensor& sum_sq, std::vector<int64_t> stride,
                  std::vector<int64_t> padding, std::vector<int64_t> dilation,
                  int64_t groups, int64_t group_size, bool /*allow_tf32*/) {
  const GradMoments m = grad_moments_args(input, grad, sum, sum_sq, stride, padding,
                                          dilation, groups, group_size);
  grad_moments_core(m, cpu_capability(), for_each_task,
                    torch::stable::get_num_threads());
}

}  // namespace
}  // namespace fisherprune

STABLE_TORCH_LIBRARY_IMPL(fisherprune, CPU, m) {
  m.impl("grad_moments", TORCH_BOX(&fisherprune::grad_moments));
}
