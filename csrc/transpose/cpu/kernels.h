// The vector code of transpose: one source (body.h), compiled for each set of vector
// instructions, chosen at run time. Free of torch.
#pragma once

#include <cstdint>

#include "common/cpu/capability.h"
#include "common/cpu/parallel.h"
#include "transpose/contract.h"

namespace fisherprune::cpu::transpose {

// A panel of a matrix, and where its first entry goes.
struct Panel {
  int64_t rows, columns;
  const void* from;
  int64_t from_stride;
  void* to;
  int64_t to_stride;
  bool past_caches;  // all lines of the output are whole
};

struct Kernels {
  void (*copy)(const Panel&);       // of float32
  void (*copy_half)(const Panel&);  // of bfloat16
  // Waits until what went past the caches is in memory.
  void (*drain)();
};

const Kernels& kernels(Capability capability);

void run(const Transpose& transpose, Capability capability, const Parallel& parallel);

}  // namespace fisherprune::cpu::transpose
