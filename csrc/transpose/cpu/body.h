// The kernel of transpose in one set of vector instructions; no guard, because
// kernels.cpp includes it once for each, with the macros of vector_body.h.
//
// Squares of vectors are transposed in registers. Those that lie in the same columns
// follow each other, so that a row of the output is written on where it ended.

#include "common/cpu/vector_body.h"
//
#include "common/cpu/entries_body.h"
#include "common/cpu/past_caches_body.h"
//
#include "common/cpu/pairs_body.h"

// From row i and column j: as many columns as a vector has words, and as many rows as
// these hold entries.
template <class Entry>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void copy_square(const Panel& p, int64_t i,
                                                       int64_t j) {
  Vec square[kLanes];
  load_square(static_cast<const Entry*>(p.from) + i * p.from_stride + j, p.from_stride,
              square);
  transpose_square(square);
  Entry* const to = static_cast<Entry*>(p.to) + j * p.to_stride + i;
  if (p.past_caches) {
    FISHERPRUNE_UNROLL
    for (int k = 0; k < kLanes; ++k)
      store_past(reinterpret_cast<float*>(to + k * p.to_stride), square[k]);
  } else {
    FISHERPRUNE_UNROLL
    for (int k = 0; k < kLanes; ++k)
      store_words(to + k * p.to_stride, reinterpret_cast<Words>(square[k]));
  }
}

template <class Entry>
FISHERPRUNE_TARGET void copy(const Panel& p) {
  constexpr int64_t kRows = kLanes * 4 / sizeof(Entry);
  const int64_t rows = p.rows - p.rows % kRows,
                columns = p.columns - p.columns % kLanes;
  for (int64_t j = 0; j < columns; j += kLanes)
    for (int64_t i = 0; i < rows; i += kRows) copy_square<Entry>(p, i, j);
  const Entry* const from = static_cast<const Entry*>(p.from);
  Entry* const to = static_cast<Entry*>(p.to);
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t j = i < rows ? columns : 0; j < p.columns; ++j)
      to[j * p.to_stride + i] = from[i * p.from_stride + j];
}

constexpr Kernels kTable{copy<float>, copy<BFloat16>, drain};
