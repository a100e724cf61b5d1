// The kernels of products of warpgroups alone, so that nvcc can say what it makes of
// them for sm_90a.
#include "grad_moments/cuda/wgmma_launch.cuh"

namespace fisherprune::cuda {

using namespace grad_moments;

void every_wgmma(const GradMoments& m, const Shares& shares, float* workspace) {
  launch_wgmma<WgmmaTile>(m, shares, workspace, nullptr);
  launch_wgmma<SlimWgmmaTile>(m, shares, workspace, nullptr);
}

}  // namespace fisherprune::cuda
