// All kernels without torch, so that nvcc alone can say what it makes of them.
#include "global_topk/cuda/launch.cuh"
#include "grad_moments/cuda/launch.cuh"

namespace fisherprune::cuda {

using namespace global_topk;
using namespace grad_moments;

void every_grad_moments(const GradMoments& m, bool allow_tf32, float* workspace) {
  const GradMomentsPlan plan = plan_grad_moments(m, allow_tf32, multiprocessors());
  run_grad_moments(m, plan, allow_tf32, workspace, nullptr);
}

void every_topk(const std::vector<Scores>& scores, const std::vector<int64_t>& numbers,
                const std::vector<bool*>& masks, float* floats, int64_t* words) {
  write_masks(start_topk(scores, numbers, 1, floats, words, words, 1, nullptr), masks,
              false);
  run_topk_histogram(scores, 0, DIGITS[0], words, words, 1, nullptr);
  run_topk_masks(scores, 0.f, numbers, masks, words, 1, nullptr);
}

}  // namespace fisherprune::cuda
