// Compiles the micro-kernels for each set of vector instructions.
#include "grad_moments/cpu/microkernel.h"

#include <numeric>

#include "common/cpu/unroll.h"
#include "grad_moments/cpu/tuning.h"

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

#define FISHERPRUNE_BODY "grad_moments/cpu/microkernel_body.h"
#include "common/cpu/each_capability.h"

static_assert(fits(portable::kTable));
#if defined(__x86_64__)
static_assert(fits(avx2::kTable) && fits(avx512::kTable));
#endif

const Microkernels& microkernels(Capability capability) { return table_of(capability); }

}  // namespace fisherprune::cpu::grad_moments
