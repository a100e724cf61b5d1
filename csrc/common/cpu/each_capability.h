// Compiles a body once for each set of vector instructions, and chooses at run time. It
// needs no compiler flag: one binary serves all processors of an architecture. No
// guard: each way includes it once, in its own namespace, with
//   FISHERPRUNE_BODY  the file of its body, which ends in a constant kTable
// The body is compiled with the macros that vector_body.h names.

#if defined(__x86_64__)
namespace avx512 {
#define FISHERPRUNE_TARGET __attribute__((target("avx512f")))
#define FISHERPRUNE_LANES 16
#define FISHERPRUNE_WIDE 1
#include FISHERPRUNE_BODY
#undef FISHERPRUNE_TARGET
#undef FISHERPRUNE_LANES
#undef FISHERPRUNE_WIDE
}  // namespace avx512

namespace avx2 {
#define FISHERPRUNE_TARGET __attribute__((target("avx2,fma")))
#define FISHERPRUNE_LANES 8
#define FISHERPRUNE_WIDE 0
#include FISHERPRUNE_BODY
#undef FISHERPRUNE_TARGET
#undef FISHERPRUNE_LANES
#undef FISHERPRUNE_WIDE
}  // namespace avx2
#endif

namespace portable {
#define FISHERPRUNE_TARGET
#define FISHERPRUNE_LANES 4
#define FISHERPRUNE_WIDE 0
#include FISHERPRUNE_BODY
}  // namespace portable

inline const auto& table_of(Capability capability) {
#if defined(__x86_64__)
  if (capability == Capability::avx512) return avx512::kTable;
  if (capability == Capability::avx2) return avx2::kTable;
#endif
  (void)capability;
  return portable::kTable;
}
