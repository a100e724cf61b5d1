// transpose: the contract, free of torch.
//
//     output[j, i] = matrix[i, j]
//
// of a matrix [rows, columns] whose rows lie side by side, as those of the output do.
// Entries are float32 or bfloat16.
#pragma once

#include <cstdint>

#include "common/view.h"

namespace fisherprune {

struct Transpose {
  int64_t rows, columns;  // of the matrix
  Dtype dtype;
  const void* matrix;
  void* output;

  int64_t entry_bytes() const { return dtype == Dtype::float32 ? 4 : 2; }
};

}  // namespace fisherprune
