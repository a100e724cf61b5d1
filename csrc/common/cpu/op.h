// What every op body on the CPU needs of torch: its threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "common/cpu/parallel.h"

namespace fisherprune::cpu {

inline void in_parallel(int64_t count, const Body& body) {
  torch::stable::parallel_for(0, count, 1, body);
}

}  // namespace fisherprune::cpu
