// max_pool2d on the CPU, free of torch.
#pragma once

#include "common/cpu/capability.h"
#include "common/cpu/parallel.h"
#include "max_pool/contract.h"

namespace fisherprune::cpu::max_pool {

void forward(const MaxPool& pool, Capability capability, const Parallel& parallel);
void backward(const MaxPoolBackward& pool, Capability capability,
              const Parallel& parallel);

}  // namespace fisherprune::cpu::max_pool
