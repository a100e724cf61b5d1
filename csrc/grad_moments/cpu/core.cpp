// Chooses the way to compute a call. The choice depends on the shape and the vector
// instructions alone, never on the number of threads.
#include "grad_moments/cpu/core.h"

#include "grad_moments/cpu/depthwise.h"
#include "grad_moments/cpu/linear.h"
#include "grad_moments/cpu/narrow.h"
#include "grad_moments/cpu/parts.h"
#include "grad_moments/cpu/plain.h"
#include "grad_moments/cpu/tuning.h"
#include "grad_moments/cpu/winograd.h"

namespace fisherprune::cpu::grad_moments {
namespace {

void in_one_piece(int64_t count, const Body& body) { body(0, count); }

// Whether other threads would take longer to start than they would save.
bool is_small(const ConvShape& s) {
  const double work =
      static_cast<double>(s.samples) * s.positions() * s.outputs * s.patch();
  return work < tuning::kSerialWork;
}

}  // namespace

void accumulate(const GradMoments& moments, Capability capability,
                const Parallel& parallel, int64_t threads) {
  const ConvShape& s = moments.shape;
  if (s.samples == 0 || s.positions() == 0 || s.outputs == 0 || s.patch() == 0) return;
  const Machine machine{microkernels(capability),
                        is_small(s) ? Parallel(in_one_piece) : parallel, threads};
  if (winograd_pays(s, machine.kernels)) {
    for (const Part& part : accumulate_by_winograd(moments, machine))
      accumulate_part(moments, part, machine);
  } else if (is_mostly_padding(s)) {
    accumulate_taps(moments, machine);
  } else if (linear_pays(s)) {
    accumulate_linear(moments, capability, machine);
  } else if (const int64_t taken = depthwise_channels(moments, capability)) {
    accumulate_depthwise(moments, capability, machine);
    if (taken < s.groups)
      accumulate_groups(moments, {taken, s.groups - taken}, machine);
  } else if (narrow_pays(s)) {
    for (const ConvGroups& groups : accumulate_narrow(moments, capability, machine))
      accumulate_groups(moments, groups, machine);
  } else {
    accumulate_plainly(moments, machine);
  }
}

}  // namespace fisherprune::cpu::grad_moments
