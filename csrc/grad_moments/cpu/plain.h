// grad_moments by multiplying every input with the gradients that it meets.
#pragma once

#include "grad_moments/contract.h"
#include "grad_moments/cpu/machine.h"

namespace fisherprune::cpu::grad_moments {

void accumulate_plainly(const GradMoments& moments, const Machine& machine);

}  // namespace fisherprune::cpu::grad_moments
