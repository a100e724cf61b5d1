// grad_moments of convolutions whose groups have few channels and outputs, such as
// depthwise ones: the lanes of a vector are positions. Free of torch.
#pragma once

#include <cstdint>
#include <vector>

#include "common/cpu/capability.h"
#include "grad_moments/contract.h"
#include "grad_moments/cpu/machine.h"
#include "grad_moments/cpu/parts.h"

namespace fisherprune::cpu::grad_moments {

// Whether it is possible and takes less time. Depends on the shape alone.
bool narrow_pays(const ConvShape& shape);

// Adds the moments, except those of convolution groups of which some are not finite:
// there it adds nothing, and returns the groups. Where a number is not finite this way
// spoils weights that never meet it.
std::vector<ConvGroups> accumulate_narrow(const GradMoments& moments,
                                          Capability capability,
                                          const Machine& machine);

}  // namespace fisherprune::cpu::grad_moments
