// Who does what. Each task has some channels of samples, one after the other, or some
// blocks of channels where these lie last: input and gradient are read once, the
// input's gradient is written once. A channel of a sample has one owner: results are
// equal bit for bit, whatever the number of threads.
#include "channel_affine/cpu/kernels.h"

#include <algorithm>

#include "common/cpu/unroll.h"

namespace fisherprune::cpu::channel_affine {

#define FISHERPRUNE_BODY "channel_affine/cpu/body.h"
#include "common/cpu/each_capability.h"

namespace {

constexpr int64_t kTaskFloats = 1 << 14;

}  // namespace

void run(const ChannelAffineBackward& affine, Capability capability,
         const Parallel& parallel) {
  const bool last = affine.channels_last;
  const Range range = last ? table_of(capability).blocks : table_of(capability).rows;
  const int64_t ranges =
      affine.samples * (last ? blocks_of(affine.channels) : affine.channels);
  const int64_t floats = affine.positions * (last ? kBlock : 1);
  const int64_t each = std::max<int64_t>(kTaskFloats / std::max<int64_t>(floats, 1), 1);
  for_each_task(parallel, ceil_div(ranges, each), [&](int64_t task) {
    range(affine, task * each, std::min((task + 1) * each, ranges));
  });
}

}  // namespace fisherprune::cpu::channel_affine
