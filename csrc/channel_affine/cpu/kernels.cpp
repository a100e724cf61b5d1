// Who does what. Each task has some channels of samples, one after the other: input and
// gradient are read once, the input's gradient is written once. A row has one owner:
// results are equal bit for bit, whatever the number of threads.
#include "channel_affine/cpu/kernels.h"

#include <algorithm>

#include "common/cpu/unroll.h"
#include "common/integers.h"

namespace fisherprune::cpu::channel_affine {

#define FISHERPRUNE_BODY "channel_affine/cpu/body.h"
#include "common/cpu/each_capability.h"

namespace {

constexpr int64_t kTaskFloats = 1 << 14;

}  // namespace

void run(const ChannelAffineBackward& affine, Capability capability,
         const Parallel& parallel) {
  const int64_t rows = affine.samples * affine.channels;
  const int64_t positions = std::max<int64_t>(affine.positions, 1);
  const int64_t each = std::max<int64_t>(kTaskFloats / positions, 1);
  for_each_task(parallel, ceil_div(rows, each), [&](int64_t task) {
    table_of(capability).rows(affine, task * each, std::min((task + 1) * each, rows));
  });
}

}  // namespace fisherprune::cpu::channel_affine
