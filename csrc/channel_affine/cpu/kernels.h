// The code of channel_affine_backward: one source (body.h), compiled for each set of
// vector instructions, chosen at run time. Free of torch.
#pragma once

#include "channel_affine/contract.h"
#include "common/cpu/capability.h"
#include "common/cpu/parallel.h"

namespace fisherprune::cpu::channel_affine {

// Of the channels of samples [first, last), counted from the first sample's.
using Rows = void (*)(const ChannelAffineBackward&, int64_t first, int64_t last);

struct Kernels {
  Rows rows;
};

void run(const ChannelAffineBackward& affine, Capability capability,
         const Parallel& parallel);

}  // namespace fisherprune::cpu::channel_affine
