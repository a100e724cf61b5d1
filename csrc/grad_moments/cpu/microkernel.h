// The vector code of grad_moments: one source (microkernel_body.h), compiled for each
// set of vector instructions, chosen at run time. Free of torch.
#pragma once

#include <cstdint>

#include "common/cpu/capability.h"

namespace fisherprune::cpu::grad_moments {

// Consecutive entries of the positions, of one group of samples, summed in registers. A
// group that is cut into several runs waits in the carry tile.
struct Run {
  int32_t begin, end;
  float scale;     // 1 / |j|
  bool continues;  // the carry holds what came before in this group
  bool finishes;   // the group is complete: scale, square, add
};

// What all micro-tiles of one column share.
struct Column {
  const float* input;  // packed; a row of the patch and a position give an address
  const float* grad;   // packed, [positions][lanes]
  // The positions at which to multiply, in the order of the runs: their places in the
  // gradient (read for short runs alone; others take all) and in the input.
  const int32_t* position;
  const int32_t* offset;
  const Run* runs;
  int64_t run_count;
  int64_t row_stride;  // floats from one row of a tile of moments to the next
};

// Multiplies R rows of the patch, whose addresses are input + base[r] + offset[t], by
// all lanes, run by run: G = scale * sum_t input * grad, sum += G, sum_sq += G * G on
// R rows of lanes. Where sum_sq is null there is only the sum. The carry is [R][lanes].
using MicroTile = void (*)(const Column&, const int64_t* base, float* sum,
                           float* sum_sq, float* carry);

constexpr int kMostRows = 16;  // of any micro-tile

struct MicroTileOf {
  int rows;
  MicroTile run;
};

enum class Operand {
  broadcast,  // lanes are outputs: every lane meets the same input
  lanes,      // lanes are convolution groups: every lane has its own input
};

namespace winograd {

// A tile of 4 x 4 positions meets 6 x 6 inputs: 36 products give the 9 taps of a
// kernel.
constexpr int kEdge = 4, kReach = 6, kPlaces = kReach * kReach, kTaps = 9;

// The tiles of one unit.
struct Grid {
  int64_t rows, cols;
  int64_t stride;  // tiles from one place to the next in packed form
};

// from: the positions of a unit, [row][column][width]; to: [place][tile][width];
// largest: [width], the magnitudes of these and of earlier units
using Transform = void (*)(const float* from, int64_t width, const Grid& grid,
                           float* to, float* largest);

// What a micro-tile reads: [unit][place][tile][lane of a channel or of an output].
struct Operands {
  const float* input;  // from the micro-tile's first channel on
  const float* grad;   // of its column
  int64_t stride;      // of the grid
};

// Multiplies some channels by all lanes of a column, unit by unit: each run is one
// unit, counted in tiles. sum and sum_sq are [channel][tap][lane], the carry is
// [channel][vector][tap][lane]. To the power, [vector][3][lane], it adds the squares of
// the 36 sums, of the taps computed from them, and of the taps that it takes for zero.
using MicroTile = void (*)(const Operands& operands, const Run* runs, int64_t run_count,
                           float* sum, float* sum_sq, float* carry, float* power);

struct Kernels {
  int64_t rows;             // channels of a micro-tile
  int64_t max_vectors;      // of outputs
  MicroTile micro_tile[5];  // by the number of vectors, 1 to max_vectors
  Transform input, grad;
  // Whether some of the 9 squares, [tap][width], is at most that of share * size[lane].
  bool (*any_small)(const float* squares, int64_t width, float share,
                    const float* size);
};

}  // namespace winograd

struct Microkernels {
  int lanes;                 // floats of one vector
  int max_vectors;           // vectors of one micro-tile
  MicroTileOf broadcast[5];  // by the number of vectors, 1 to max_vectors
  MicroTileOf depthwise;     // one vector, Operand::lanes
  // For runs that are whole groups of few listed positions; with squares, without
  // carry.
  int short_vectors;          // of one micro-tile; 0 where the registers are too few
  MicroTileOf short_runs[3];  // by the number of vectors, 1 to short_vectors
  // to[c * to_stride + r] = from[r * from_stride + c]
  void (*transpose)(const float* from, int64_t from_stride, int64_t rows, int64_t cols,
                    float* to, int64_t to_stride);
  // to[c * to_stride + r] += from[r * from_stride + c]
  void (*add_transposed)(const float* from, int64_t from_stride, int64_t rows,
                         int64_t cols, float* to, int64_t to_stride);
  winograd::Kernels winograd;
};

const Microkernels& microkernels(Capability capability);

}  // namespace fisherprune::cpu::grad_moments
