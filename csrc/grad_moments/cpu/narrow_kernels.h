// The vector code of the narrow way: one source (narrow_body.h), compiled for each set
// of vector instructions, chosen at run time. Free of torch.
#pragma once

#include <cstdint>

#include "common/cpu/capability.h"
#include "grad_moments/contract.h"

namespace fisherprune::cpu::grad_moments::narrow {

constexpr int kMostRows = 9, kMostOutputs = 4;  // of one call of Multiply

// Multiplies some rows of the patch, whose first addresses are input + base[r], by some
// outputs, grad_step floats apart, over `length` consecutive places, whole vectors. The
// sums of row r and output v go to sums + v * sums_step + r * lanes, a vector of lanes
// that are still to be added up. With `add` they join what is there.
using Multiply = void (*)(const float* input, const int64_t* base, const float* grad,
                          int64_t grad_step, int64_t length, float* sums,
                          int64_t sums_step, bool add);

// Rows of some channels' images as they lie in memory: elements from one row, column
// or channel to the next; and to those of the next sample, which are asked for ahead.
struct Rows {
  const void* first;
  Dtype dtype;
  int64_t row_stride, step, channel_stride;
  int64_t rows, cols, channels;
  int64_t ahead;
};

// Where they go: floats from one row, or channel, to the next.
struct Place {
  float* first;
  int64_t pitch, channel_stride;
};

struct Kernels {
  int lanes;                        // floats of one vector
  int most_rows[kMostOutputs + 1];  // of one call, by its outputs; 0: no such call
  Multiply multiply[kMostOutputs + 1][kMostRows + 1];  // by outputs and rows
  void (*copy_rows)(const Rows& from, const Place& to);
  // The same for float32 channels side by side, whole vectors of them, by transposing
  // squares. Behind every row up to a vector less one of zeros are written.
  void (*transpose_rows)(const Rows& from, const Place& to);
  // Adds up the lanes of `count` vectors, whole squares: G = scale * the sum of one,
  // sum += G, sum_sq += G * G.
  void (*add_moments)(const float* sums, int64_t count, float scale, float* sum,
                      float* sum_sq);
};

const Kernels& kernels(Capability capability);

}  // namespace fisherprune::cpu::grad_moments::narrow
