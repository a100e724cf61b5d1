// Some of a layer's weights, taken as a layer of their own.
#pragma once

#include "grad_moments/contract.h"
#include "grad_moments/cpu/machine.h"

namespace fisherprune::cpu::grad_moments {

// The weights of some channels and some outputs.
struct Part {
  int64_t channel, channels, output, outputs;
};

// Adds the moments of a part of the weights of a convolution without groups.
void accumulate_part(const GradMoments& all, const Part& part, const Machine& machine);

// Some consecutive groups of a convolution.
struct ConvGroups {
  int64_t first, count;
};

// Adds the moments of some groups of a convolution.
void accumulate_groups(const GradMoments& all, ConvGroups groups,
                       const Machine& machine);

// Whether the input that is packed for a sample would be large, and zeros for the most
// part: where padding and dilation are much larger than the image.
bool is_mostly_padding(const ConvShape& s);

// Adds the moments tap by tap, each at the positions where it meets the image: no zero
// is packed. A tap that never meets the image has no moments.
void accumulate_taps(const GradMoments& all, const Machine& machine);

}  // namespace fisherprune::cpu::grad_moments
