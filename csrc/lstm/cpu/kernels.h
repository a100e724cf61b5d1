// The code of lstm: one source of vector code (body.h), compiled for each set of vector
// instructions, chosen at run time. Free of torch.
#pragma once

#include <cstdint>

#include "common/cpu/capability.h"
#include "common/cpu/parallel.h"
#include "lstm/contract.h"

namespace fisherprune::cpu::lstm {

// A matrix [depth, columns] in panels of some columns each, one row of a panel after
// the other; there are zeros behind the last column.
struct Packed {
  const float* data;
  int64_t depth, panels;
};

// The samples of a task.
struct Task {
  int64_t first, count;
  Packed weight;    // that the steps multiply by
  float* products;  // [count, panels * columns of a panel]
};

struct Kernels {
  int64_t columns;  // of a panel
  void (*forward)(const Lstm&, const Task&);
  void (*backward)(const LstmBackward&, const Task&);
};

const Kernels& kernels(Capability capability);

void forward(const Lstm& lstm, Capability capability, const Parallel& parallel);
void backward(const LstmBackward& lstm, Capability capability,
              const Parallel& parallel);

}  // namespace fisherprune::cpu::lstm
