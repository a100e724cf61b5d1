// How grad_moments cuts one call: into units and blocks, columns of tiles and runs of
// positions. Depends on the shape and the vector instructions alone.
#pragma once

#include <cstdint>
#include <vector>

#include "grad_moments/contract.h"
#include "grad_moments/cpu/microkernel.h"
#include "grad_moments/cpu/units.h"

namespace fisherprune::cpu::grad_moments {

// What is read of one sample: h = h0 + i * row_step and w = w0 + j * col_step for row i
// and column j; zero outside of the image.
struct Window {
  int64_t h0, w0, rows, cols, row_step, col_step;
  int64_t size() const { return rows * cols; }
};

// The tiles, below each other, of the outputs first_output + i * output_step: up to
// kTileLanes lanes wide, all rows of the patch high.
struct ColumnOfTiles {
  int64_t first_output, output_step;
  int64_t lanes;      // that hold an output
  int64_t vectors;    // that are computed
  int64_t input_row;  // row of the packed input where its channels begin
  int64_t grad_lane;  // lanes of the columns before it
};

// The positions of a block at which some rows of the patch are multiplied, in order:
// all of them, or those that read the image and not its padding.
struct Positions {
  std::vector<int32_t> position, offset;  // in the packed gradient and input
  // Runs of positions as runs of places in these lists.
  std::vector<Run> places_of(const std::vector<Run>& runs) const;
};

struct Plan {
  ConvShape shape;
  Operand operand;
  // One position a sample and groups of one: G = d a, so that the moments are products
  // over the samples, of d and a, and of their squares (whose range float32 must hold).
  bool products;
  bool carries;     // some group does not end in the run in which it began
  bool short_runs;  // groups of few positions: micro-tiles with their moments in
                    // registers

  Units units;             // of output rows
  int64_t most_positions;  // of one block
  int64_t packed_lanes;    // of the gradient, all columns
  int64_t input_lanes;     // floats of one packed input: 1, or a vector of channels
  int64_t input_rows;      // packed channels, all groups

  std::vector<ColumnOfTiles> columns;
  std::vector<int64_t> base;  // of each row of the patch, in the packed input
  // For small images with padding, one for each tap: rows of the patch use them in
  // turns. Otherwise one for all rows.
  std::vector<Positions> positions;

  // What `rows` output rows read of the input, from output row `first` on.
  Window input_window(int64_t first, int64_t rows) const;
  Window input_window_of(int64_t unit) const;
  Window grad_window_of(int64_t unit) const;
  int64_t plane() const;  // floats of one packed input channel
  int64_t input_stride() const { return plane() * units.block_units; }
  std::vector<Run> runs_of(Block block) const;
};

Plan plan_of(const ConvShape& shape, const Microkernels& kernels);

}  // namespace fisherprune::cpu::grad_moments
