// The code of channel_affine_backward: one source (body.h), compiled for each set of
// vector instructions, chosen at run time. Free of torch.
#pragma once

#include "channel_affine/contract.h"
#include "common/cpu/capability.h"
#include "common/cpu/parallel.h"
#include "common/integers.h"

namespace fisherprune::cpu::channel_affine {

// Of the channels of samples [first, last), counted from the first sample's; with the
// channels last, of blocks of channels [first, last), counted likewise.
using Range = void (*)(const ChannelAffineBackward&, int64_t first, int64_t last);

struct Kernels {
  Range rows, blocks;
};

// Channels of a block; the last one of a sample has the rest, too, so that vectors
// which end with the last channel begin in the same block.
constexpr int64_t kBlock = 64;

inline int64_t blocks_of(int64_t channels) {
  return channels < kBlock ? 1 : channels / kBlock;
}

void run(const ChannelAffineBackward& affine, Capability capability,
         const Parallel& parallel);

}  // namespace fisherprune::cpu::channel_affine
