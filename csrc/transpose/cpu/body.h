// The kernel of transpose in one set of vector instructions; no guard, because
// kernels.cpp includes it once for each, with the macros of vector_body.h.
//
// Squares of vectors are transposed in registers. Those that lie in the same columns
// follow each other, so that a row of the output is written on where it ended.

#include "common/cpu/vector_body.h"
//
#include "common/cpu/past_caches_body.h"

FISHERPRUNE_TARGET FISHERPRUNE_INLINE void copy_square(const Panel& p, int64_t i,
                                                       int64_t j) {
  Vec square[kLanes];
  FISHERPRUNE_UNROLL
  for (int k = 0; k < kLanes; ++k)
    square[k] = load(p.from + (i + k) * p.from_stride + j);
  transpose_square(square);
  float* const to = p.to + j * p.to_stride + i;
  if (p.past_caches) {
    FISHERPRUNE_UNROLL
    for (int k = 0; k < kLanes; ++k) store_past(to + k * p.to_stride, square[k]);
  } else {
    FISHERPRUNE_UNROLL
    for (int k = 0; k < kLanes; ++k) store(to + k * p.to_stride, square[k]);
  }
}

FISHERPRUNE_TARGET inline void copy(const Panel& p) {
  const int64_t rows = p.rows - p.rows % kLanes,
                columns = p.columns - p.columns % kLanes;
  for (int64_t j = 0; j < columns; j += kLanes)
    for (int64_t i = 0; i < rows; i += kLanes) copy_square(p, i, j);
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t j = i < rows ? columns : 0; j < p.columns; ++j)
      p.to[j * p.to_stride + i] = p.from[i * p.from_stride + j];
}

constexpr Kernels kTable{copy, drain};
