// The code of row_moments: one source (body.h), compiled for each set of vector
// instructions, chosen at run time. Free of torch.
#pragma once

#include "common/cpu/capability.h"
#include "common/cpu/parallel.h"
#include "row_moments/contract.h"

namespace fisherprune::cpu::row_moments {

constexpr int64_t kColumns = 512;  // whose sums stay in the first cache

struct Kernels {
  // Of the columns [first, last), at most kColumns.
  void (*columns)(const RowMoments&, int64_t first, int64_t last);
};

void run(const RowMoments& moments, Capability capability, const Parallel& parallel);

}  // namespace fisherprune::cpu::row_moments
