// grad_moments on the CPU, free of torch: tests compile it alone.
#pragma once

#include <functional>

#include "grad_moments/contract.h"
#include "common/cpu/capability.h"

namespace fisherprune {

// Calls body(i) once for each i in [0, count), on any threads in any order.
using ParallelFor =
    std::function<void(int64_t count, const std::function<void(int64_t)>& body)>;

// `threads` only decides into how many tasks the tiles are dealt, never the result.
void grad_moments_core(const GradMoments& moments, Capability capability,
                       const ParallelFor& parallel_for, int64_t threads);

}  // namespace fisherprune
