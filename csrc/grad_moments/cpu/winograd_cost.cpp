// Whether Winograd's way pays: what it costs, and what the plain way costs.
#include <algorithm>

#include "common/integers.h"
#include "grad_moments/cpu/tuning.h"
#include "grad_moments/cpu/winograd.h"

namespace fisherprune::cpu::grad_moments {
namespace {

int64_t positions_inside(int64_t size, int64_t out, int64_t pad) {
  int64_t count = 0;
  for (int64_t y = 0; y < 3; ++y)
    for (int64_t p = 0; p < out; ++p) count += p + y >= pad && p + y < size + pad;
  return count;
}

// What a vector of outputs costs for each channel and sample, in multiplications of a
// vector: by the plain way, whose short runs leave out the padding, and by this one.
int64_t plain_cost(const ConvShape& s) {
  const bool is_short =
      s.positions() * std::min(s.group_size, s.samples) <= tuning::kShortRunPositions;
  if (!is_short) return winograd::kTaps * s.positions() + 2 * winograd::kTaps;
  return positions_inside(s.height, s.out_height, s.pad_h) *
             positions_inside(s.width, s.out_width, s.pad_w) +
         2 * winograd::kTaps;
}

int64_t winograd_cost(const ConvShape& s) {
  const int64_t tiles =
      ceil_div(s.out_height, winograd::kEdge) * ceil_div(s.out_width, winograd::kEdge);
  return tiles * tuning::kWinogradTileCost + tuning::kWinogradSampleCost;
}

}  // namespace

bool winograd_pays(const ConvShape& s, const Microkernels& kernels) {
  const int64_t vectors =
      ceil_div(s.channels, kernels.lanes) * ceil_div(s.outputs, kernels.lanes);
  const bool possible = s.kernel_h == 3 && s.kernel_w == 3 && s.stride_h == 1 &&
                        s.stride_w == 1 && s.dilation_h == 1 && s.dilation_w == 1 &&
                        s.groups == 1;
  return possible && vectors >= tuning::kWinogradLeastTasks &&
         winograd_cost(s) < plain_cost(s);
}

}  // namespace fisherprune::cpu::grad_moments
