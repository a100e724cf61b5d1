// Compiles the depthwise way's kernels for each set of vector instructions.
#include "grad_moments/cpu/depthwise_kernels.h"

#include <algorithm>

#include "common/cpu/half_float.h"
#include "grad_moments/cpu/unroll.h"

namespace fisherprune::cpu::grad_moments::depthwise {

#if defined(__x86_64__)
namespace avx512 {
#define FISHERPRUNE_TARGET __attribute__((target("avx512f")))
#define FISHERPRUNE_LANES 16
#define FISHERPRUNE_WIDE 1
#include "grad_moments/cpu/depthwise_body.h"
#undef FISHERPRUNE_TARGET
#undef FISHERPRUNE_LANES
#undef FISHERPRUNE_WIDE
}  // namespace avx512

namespace avx2 {
#define FISHERPRUNE_TARGET __attribute__((target("avx2,fma")))
#define FISHERPRUNE_LANES 8
#define FISHERPRUNE_WIDE 0
#include "grad_moments/cpu/depthwise_body.h"
#undef FISHERPRUNE_TARGET
#undef FISHERPRUNE_LANES
#undef FISHERPRUNE_WIDE
}  // namespace avx2
#endif

namespace portable {
#define FISHERPRUNE_TARGET
#define FISHERPRUNE_LANES 4
#define FISHERPRUNE_WIDE 0
#include "grad_moments/cpu/depthwise_body.h"
}  // namespace portable

const Kernels& kernels(Capability capability) {
#if defined(__x86_64__)
  if (capability == Capability::avx512) return avx512::kTable;
  if (capability == Capability::avx2) return avx2::kTable;
#endif
  (void)capability;
  return portable::kTable;
}

}  // namespace fisherprune::cpu::grad_moments::depthwise
