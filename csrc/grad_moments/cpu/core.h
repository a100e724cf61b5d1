// grad_moments on the CPU, free of torch: tests compile it alone.
#pragma once

#include "common/cpu/capability.h"
#include "common/cpu/parallel.h"
#include "grad_moments/contract.h"

namespace fisherprune::cpu::grad_moments {

// Adds a call's moments, by the way that takes the least time. `threads` decides into
// how many tasks work is dealt, never the result.
void accumulate(const GradMoments& moments, Capability capability,
                const Parallel& parallel, int64_t threads);

}  // namespace fisherprune::cpu::grad_moments
