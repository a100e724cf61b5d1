// grad_moments of depthwise convolutions whose channels lie side by side, such as
// channels_last: the lanes of a vector are channels. Free of torch.
#pragma once

#include "grad_moments/contract.h"
#include "grad_moments/cpu/machine.h"

namespace fisherprune::cpu::grad_moments {

// The channels, from the first, that this way takes: whole vectors; often none.
int64_t depthwise_channels(const GradMoments& moments, Capability capability);

// Adds the moments of these channels.
void accumulate_depthwise(const GradMoments& moments, Capability capability,
                          const Machine& machine);

}  // namespace fisherprune::cpu::grad_moments
