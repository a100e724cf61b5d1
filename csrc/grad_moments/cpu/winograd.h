// grad_moments of 3 x 3 convolutions by Winograd's minimal filtering: 36
// multiplications instead of 144. Free of torch.
#pragma once

#include <cstdint>
#include <vector>

#include "grad_moments/contract.h"
#include "grad_moments/cpu/machine.h"
#include "grad_moments/cpu/parts.h"

namespace fisherprune::cpu::grad_moments {

// Whether it is possible and takes less time. Depends on the shape and the vector
// instructions alone.
bool winograd_pays(const ConvShape& shape, const Microkernels& kernels);

// Adds the moments, except those of parts for which rounding errors would be too large:
// there it adds nothing, and returns the parts. Rounding errors are too large where
// products much larger than the gradients cancel, because large inputs lie beside
// inputs that meet a gradient, and where numbers overflow or are not finite. Which
// parts these are depends on the numbers, not on the threads.
std::vector<Part> accumulate_by_winograd(const GradMoments& moments,
                                         const Machine& machine);

}  // namespace fisherprune::cpu::grad_moments
