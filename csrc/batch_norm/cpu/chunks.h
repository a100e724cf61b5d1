// How the entries of channels are cut into chunks. It depends on the shape alone, and
// so do the results.
#pragma once

#include <algorithm>

#include "batch_norm/contract.h"
#include "batch_norm/cpu/kernels.h"
#include "common/integers.h"

namespace fisherprune::cpu::batch_norm {

constexpr int64_t kChunk = 2048;     // floats that stay in the first cache
constexpr int64_t kShortRow = 32;    // shorter rows are read as columns
constexpr int64_t kLeastRows = 16;   // of a chunk of columns
constexpr int64_t kMostRows = 128;   // so that no float sum is long
constexpr int64_t kColumns = 16384;  // floats of a chunk of columns

// Rows: a unit is a channel, its entries are `outer` rows. A chunk is some whole rows,
// or a piece of a long one.
// Columns: where rows are short, all of the memory is one unit, a matrix of channels *
// inner columns, each of one channel. A chunk is some rows of the matrix.
class Chunks {
 public:
  explicit Chunks(const BatchNormShape& s)
      : columns(s.inner < kShortRow && s.channels > 1),
        units(columns ? 1 : s.channels),
        width_(columns ? s.channels * s.inner : s.inner),
        rows_(s.outer),
        stride_(s.channels * s.inner),
        pieces_(columns ? 1 : ceil_div(width_, kChunk)),
        step_(columns ? std::min(kMostRows, std::max(kLeastRows, kColumns / width_))
                      : std::max<int64_t>(1, kChunk / width_)),
        count(ceil_div(rows_, step_) * pieces_) {}

  Block block(int64_t chunk) const {
    const int64_t piece = chunk % pieces_, first = chunk / pieces_ * step_;
    return {std::min(step_, rows_ - first), stride_,
            pieces_ == 1 ? width_ : std::min(kChunk, width_ - piece * kChunk)};
  }

  // The chunk's first entry.
  int64_t at(int64_t unit, int64_t chunk) const {
    return chunk / pieces_ * step_ * stride_ + unit * width_ + chunk % pieces_ * kChunk;
  }

  // Sums of a chunk: one for each column, or one.
  int64_t sums() const { return columns ? width_ : 1; }

  // Where those of a unit's chunk begin.
  int64_t sums_at(int64_t unit, int64_t chunk) const {
    return (unit * count + chunk) * sums();
  }

  // Entries behind one sum.
  int64_t entries(int64_t chunk) const {
    const Block b = block(chunk);
    return columns ? b.rows : b.rows * b.width;
  }

  const bool columns;
  const int64_t units;

 private:
  const int64_t width_, rows_, stride_, pieces_, step_;

 public:
  const int64_t count;  // of a unit
};

}  // namespace fisherprune::cpu::batch_norm
