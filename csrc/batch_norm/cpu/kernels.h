// The vector code of batch_norm: one source (body.h), compiled for each set of vector
// instructions, chosen at run time. Free of torch.
#pragma once

#include <cstdint>

#include "common/cpu/capability.h"

namespace fisherprune::cpu::batch_norm {

// Some rows of memory, `stride` entries apart.
struct Block {
  int64_t rows, stride, width;
};

// Three sums of a block: one float each, or one for each column.
struct Sums {
  float* of[3];

  Sums from(int64_t i) const { return {{of[0] + i, of[1] + i, of[2] + i}}; }
};

// What an entry is computed with: one float each, or one for each column, and as many
// floats of memory behind them as a vector has.
struct Coefficients {
  const float* of[4];

  Coefficients from(int64_t i) const {
    return {{of[0] + i, of[1] + i, of[2] + i, of[3] + i}};
  }
};

struct Operands {
  const void* grad;    // backward only
  const void* input;   //
  const void* second;  // forward: the residual; backward: the output; or null
  void* result;        // null where there is none
  bool relu;           // forward only
};

struct Kernels {
  int lanes;
  // Each by whether a sum or a coefficient belongs to a column, then by whether entries
  // are bfloat16.

  // shift = about the mean of the block; sums: shift, sum x - shift, sum (x - shift)^2
  void (*measure[2][2])(const Operands&, const Block&, const Sums&);
  // result = relu?((x - c0) * c1 + c2 + residual?)
  void (*normalize[2][2])(const Operands&, const Block&, const Coefficients&);
  // With g the gradient where output > 0: result = g where there is a result; sums: g,
  // g * (x - c0), x - c0
  void (*reduce[2][2])(const Operands&, const Block&, const Coefficients&, const Sums&);
  // result = g * c1 + (x - c0) * c2 + c3
  void (*differentiate[2][2])(const Operands&, const Block&, const Coefficients&);
};

const Kernels& kernels(Capability capability);

}  // namespace fisherprune::cpu::batch_norm
