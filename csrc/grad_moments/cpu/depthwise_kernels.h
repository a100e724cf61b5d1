// The vector code of the depthwise way: one source (depthwise_body.h), compiled for
// each set of vector instructions, chosen at run time. Free of torch.
#pragma once

#include <cstdint>

#include "common/cpu/capability.h"
#include "grad_moments/contract.h"
#include "grad_moments/cpu/inside.h"

namespace fisherprune::cpu::grad_moments::depthwise {

constexpr int64_t kMostTaps = 7;  // of one call

// What one row of the output and one row of the kernel multiply, for one vector of
// channels that lie side by side.
struct Row {
  const void* input;   // what the first tap meets at column 0; may lie outside
  const void* grad;    // column 0
  int64_t input_step;  // elements from one column of the output to the next
  int64_t tap_step;    // elements from one tap to the next
  int64_t grad_step;
  int64_t taps;
  const Inside* inside;  // of each tap: the columns at which it is over the image
};

struct Kernels {
  int lanes;  // channels of one vector
  // sums[tap * lanes + lane] += sum over the columns of input * grad, by dtype
  void (*add_row[3])(const Row& row, float* sums);
};

const Kernels& kernels(Capability capability);

}  // namespace fisherprune::cpu::grad_moments::depthwise
