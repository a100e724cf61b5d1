// grad_moments of 3 x 3 convolutions by Winograd's minimal filtering: 36
// multiplications where 144 are usual. Free of torch.
#pragma once

#include "../grad_moments.h"
#include "grad_moments_core.h"
#include "microkernel.h"

namespace fisherprune {

// Whether it is possible and takes less time. Depends on the shape and the vector
// instructions alone.
bool winograd_pays(const ConvShape& shape, const Microkernels& kernels);

void grad_moments_winograd(const GradMoments& moments, const Microkernels& kernels,
                           const ParallelFor& each, int64_t threads);

}  // namespace fisherprune
