// transpose: the contract, free of torch.
//
//     output[j, i] = matrix[i, j]
//
// of a matrix [rows, columns] whose rows lie side by side, as those of the output do.
#pragma once

#include <cstdint>

namespace fisherprune {

struct Transpose {
  int64_t rows, columns;  // of the matrix
  const float* matrix;
  float* output;
};

}  // namespace fisherprune
