// How grad_moments takes the samples of a call, in order: units, blocks of units, and
// runs of positions.
#pragma once

#include <cstdint>
#include <vector>

#include "grad_moments/cpu/microkernel.h"

namespace fisherprune::cpu::grad_moments {

// The units [first, last) of one block.
struct Block {
  int64_t first, last;
  int64_t units() const { return last - first; }
};

// A unit is one sample, or some of its rows where a whole sample would leave the cache.
// A sample has rows by cols positions of the output, or as many tiles of positions.
struct Units {
  int64_t samples, rows, cols;
  int64_t group_size;   // at most the samples
  int64_t unit_rows;    // of one unit; the last one of a sample may have fewer
  int64_t per_sample;   // 1 unless samples are cut
  int64_t count;        // in all
  int64_t block_units;  // at most, in one block; 1 where samples are cut

  int64_t rows_of(int64_t unit) const;
  int64_t first_row_of(int64_t unit) const { return unit % per_sample * unit_rows; }
  int64_t sample_of(int64_t unit) const { return unit / per_sample; }
  int64_t positions_of(Block block) const;  // of all its units
  Block block_at(int64_t first) const;
  // The positions of a block, cut where a group ends and into at most `most`.
  std::vector<Run> runs_of(Block block, int64_t most) const;
  bool carries(int64_t most) const;  // some group does not end in the run it began in
};

// Units of at most `most_rows` rows; blocks of at most `most_units` whole samples, of
// equal size, and of whole groups where one fits.
Units units_of(int64_t samples, int64_t rows, int64_t cols, int64_t group_size,
               int64_t most_rows, int64_t most_units);

}  // namespace fisherprune::cpu::grad_moments
