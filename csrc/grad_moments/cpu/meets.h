// Whether the inputs of a weight meet a gradient.
#pragma once

#include <cstdint>

#include "grad_moments/contract.h"

namespace fisherprune::cpu::grad_moments {

// One weight of a convolution of stride 1, without dilation and groups.
struct Weight {
  int64_t output, channel, y, x;
};

// Whether some product of the weight's gradient has two factors that are not zero.
// Reads no further than to the first one.
bool meets(const GradMoments& moments, const Weight& weight);

}  // namespace fisherprune::cpu::grad_moments
