// grad_moments of 3 x 3 convolutions by Winograd's minimal filtering: 36
// multiplications where 144 are usual. Free of torch.
#pragma once

#include <cstdint>
#include <vector>

#include "grad_moments/contract.h"
#include "grad_moments/cpu/core.h"
#include "grad_moments/cpu/microkernel.h"

namespace fisherprune {

// Whether it is possible and takes less time. Depends on the shape and the vector
// instructions alone.
bool winograd_pays(const ConvShape& shape, const Microkernels& kernels);

// A rectangle of the weights.
struct Part {
  int64_t channel, channels, output, outputs;
};

// Adds the moments, but of parts where rounding would be too much of them; these are
// returned, with nothing added. That is where products much larger than the gradients
// cancel, since large inputs lie beside what meets a gradient, and where numbers
// overflow or are none. Which parts depends on the numbers, not on the threads.
std::vector<Part> grad_moments_winograd(const GradMoments& moments,
                                        const Microkernels& kernels,
                                        const ParallelFor& each, int64_t threads);

}  // namespace fisherprune
