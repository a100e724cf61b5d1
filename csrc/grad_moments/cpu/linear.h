// grad_moments of linear layers and 1 x 1 convolutions whose groups of samples have few
// positions: the lanes of a vector are channels. Free of torch.
#pragma once

#include "grad_moments/contract.h"
#include "grad_moments/cpu/machine.h"

namespace fisherprune::cpu::grad_moments {

// Whether it is possible and takes less time. Depends on the shape alone.
bool linear_pays(const ConvShape& shape);

void accumulate_linear(const GradMoments& moments, Capability capability,
                       const Machine& machine);

}  // namespace fisherprune::cpu::grad_moments
