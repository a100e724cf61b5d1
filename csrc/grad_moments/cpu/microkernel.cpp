// Compiles the micro-kernels for each set of vector instructions. It needs no compiler
// flag: one binary serves all processors of an architecture.
#include "grad_moments/cpu/microkernel.h"

#include <numeric>

#include "grad_moments/cpu/tuning.h"
#include "grad_moments/cpu/unroll.h"

namespace fisherprune::cpu::grad_moments {
namespace {

// Whether a tile of `rows` by `lanes` holds every micro-tile of up to `vectors`
// vectors, and whole ones of two kinds: the last column may have another kind than the
// others.
constexpr bool holds(int64_t rows, int64_t lanes, const MicroTileOf* tiles, int vectors,
                     const Microkernels& kernels) {
  bool all = kernels.lanes * vectors <= lanes;
  for (int v = 1; v <= vectors; ++v)
    for (int w = 1; w <= v; ++w)
      all &= tiles[v].rows <= kMostRows &&
             std::lcm<int64_t, int64_t>(tiles[v].rows, tiles[w].rows) <= rows;
  return all;
}

// Whether tiles and panels hold what the micro-kernels write.
constexpr bool fits(const Microkernels& k) {
  return holds(tuning::kTileRows, tuning::kTileLanes, k.broadcast, k.max_vectors, k) &&
         holds(tuning::kShortTileRows / tuning::kMostPlaces, tuning::kShortTileLanes,
               k.short_runs, k.short_vectors, k) &&
         k.depthwise.rows <= kMostRows && k.depthwise.rows <= tuning::kTileRows &&
         k.lanes * k.winograd.max_vectors <= tuning::kTileLanes &&
         k.lanes % k.winograd.rows == 0;
}

}  // namespace

#if defined(__x86_64__)
namespace avx512 {
#define FISHERPRUNE_TARGET __attribute__((target("avx512f")))
#define FISHERPRUNE_LANES 16
#define FISHERPRUNE_WIDE 1
#include "grad_moments/cpu/microkernel_body.h"
#undef FISHERPRUNE_TARGET
#undef FISHERPRUNE_LANES
#undef FISHERPRUNE_WIDE
static_assert(fits(kTable));
}  // namespace avx512

namespace avx2 {
#define FISHERPRUNE_TARGET __attribute__((target("avx2,fma")))
#define FISHERPRUNE_LANES 8
#define FISHERPRUNE_WIDE 0
#include "grad_moments/cpu/microkernel_body.h"
#undef FISHERPRUNE_TARGET
#undef FISHERPRUNE_LANES
#undef FISHERPRUNE_WIDE
static_assert(fits(kTable));
}  // namespace avx2
#endif

namespace portable {
#define FISHERPRUNE_TARGET
#define FISHERPRUNE_LANES 4
#define FISHERPRUNE_WIDE 0
#include "grad_moments/cpu/microkernel_body.h"
static_assert(fits(kTable));
}  // namespace portable

const Microkernels& microkernels(Capability capability) {
#if defined(__x86_64__)
  if (capability == Capability::avx512) return avx512::kTable;
  if (capability == Capability::avx2) return avx2::kTable;
#endif
  (void)capability;
  return portable::kTable;
}

}  // namespace fisherprune::cpu::grad_moments
