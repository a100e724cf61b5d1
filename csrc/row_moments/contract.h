// row_moments: first and second moments of rows, free of torch.
//
//     sum[p]    = sum_j m[j, p]
//     sum_sq[p] = sum_j m[j, p]^2
//
// where m[j] is the mean of the j-th group of consecutive rows. All is float32.
#pragma once

#include <cstdint>

namespace fisherprune {

struct RowMoments {
  int64_t groups, group_size, size;  // a row has so many entries, side by side
  const float* rows;
  int64_t stride;  // from one row to the next
  float *sum, *sum_sq;
};

}  // namespace fisherprune
