// Compiles the micro-kernels for each set of vector instructions: no compiler flag
// needed, one binary for all processors of an architecture.
#include "grad_moments/cpu/microkernel.h"

#define FISHERPRUNE_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define FISHERPRUNE_UNROLL _Pragma("unroll")
#else
#define FISHERPRUNE_UNROLL _Pragma("GCC unroll 32")
#endif

namespace fisherprune {

#if defined(__x86_64__)
namespace avx512 {
#define FISHERPRUNE_TARGET __attribute__((target("avx512f")))
#define FISHERPRUNE_LANES 16
#define FISHERPRUNE_WIDE 1
#include "grad_moments/cpu/microkernel_body.h"
#undef FISHERPRUNE_TARGET
#undef FISHERPRUNE_LANES
#undef FISHERPRUNE_WIDE
}  // namespace avx512

namespace avx2 {
#define FISHERPRUNE_TARGET __attribute__((target("avx2,fma")))
#define FISHERPRUNE_LANES 8
#define FISHERPRUNE_WIDE 0
#include "grad_moments/cpu/microkernel_body.h"
#undef FISHERPRUNE_TARGET
#undef FISHERPRUNE_LANES
#undef FISHERPRUNE_WIDE
}  // namespace avx2
#endif

namespace portable {
#define FISHERPRUNE_TARGET
#define FISHERPRUNE_LANES 4
#define FISHERPRUNE_WIDE 0
#include "grad_moments/cpu/microkernel_body.h"
}  // namespace portable

const Microkernels& microkernels(Capability capability) {
#if defined(__x86_64__)
  if (capability == Capability::avx512) return avx512::kTable;
  if (capability == Capability::avx2) return avx2::kTable;
#endif
  (void)capability;
  return portable::kTable;
}

}  // namespace fisherprune
