// batch_norm on the CPU, free of torch.
#pragma once

#include "batch_norm/contract.h"
#include "common/cpu/capability.h"
#include "common/cpu/parallel.h"

namespace fisherprune::cpu::batch_norm {

struct Machine {
  Capability capability;
  Parallel parallel;
  int64_t threads;
};

void forward(const BatchNorm& norm, const Machine& machine);
void backward(const BatchNormBackward& norm, const Machine& machine);

}  // namespace fisherprune::cpu::batch_norm
