// What a call of grad_moments works with.
#pragma once

#include "common/cpu/parallel.h"
#include "grad_moments/cpu/microkernel.h"

namespace fisherprune::cpu::grad_moments {

struct Machine {
  const Microkernels& kernels;
  Parallel parallel;
  int64_t threads;  // decides into how many tasks work is dealt, never the result
};

}  // namespace fisherprune::cpu::grad_moments
