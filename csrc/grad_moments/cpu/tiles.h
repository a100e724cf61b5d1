// The multiplying half of grad_moments: tasks that own tiles of the accumulators.
#pragma once

#include <cstdint>
#include <vector>

#include "common/cpu/floats.h"
#include "grad_moments/cpu/accumulator_tile.h"
#include "grad_moments/cpu/microkernel.h"
#include "grad_moments/cpu/plan.h"

namespace fisherprune::cpu::grad_moments {

// What one pass over a block reads and where it adds.
struct Pass {
  const float* input;                       // packed
  const float* grad;                        // packed
  std::vector<Run> runs;                    // of all positions
  std::vector<std::vector<Run>> places_of;  // the same, in each list of the plan
  float* sum;
  float* sum_sq;  // null: only sum
};

class Tiles {
 public:
  // `threads` only decides how many rows of the patch a task has, never the result.
  Tiles(const Plan& plan, const Microkernels& kernels, int64_t threads);
  int64_t tasks() const;
  void run(const Pass& pass, int64_t task) const;

 private:
  // The rows [row, end) of a column of tiles.
  struct Tile {
    const ColumnOfTiles& column;
    int64_t row, end;
    int64_t rows() const { return end - row; }
  };

  // The runs [first, last) of a pass.
  struct Runs {
    int64_t first, last;
  };

  Tile tile_of(int64_t task) const;
  Runs cached_runs(const Pass& pass, int64_t first, const Tile& tile) const;
  int64_t width(const ColumnOfTiles& column) const;
  MicroTileOf micro_tile(const ColumnOfTiles& column) const;
  void micro_tiles(const Pass& pass, Runs runs, const Tile& tile, float* sum,
                   float* sum_sq) const;
  float* carry_of(const Tile& tile) const;
  AccumulatorTile target(const Tile& tile, float* accumulator) const;
  void prefetch(const Pass& pass, const Tile& tile, int64_t part, int64_t parts) const;

  const Plan& plan_;
  const Microkernels& kernels_;
  int64_t patch_;
  int64_t places_;  // rows of the patch that take the lists of positions in turns
  int64_t task_rows_;
  int64_t tasks_per_column_;
  Floats carry_;  // sums of unfinished groups, one float per weight; only where needed
};

}  // namespace fisherprune::cpu::grad_moments
