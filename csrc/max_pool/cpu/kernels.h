// The vector code of max_pool2d: one source (body.h), compiled for each set of vector
// instructions, chosen at run time. Free of torch.
#pragma once

#include <cstdint>

#include "common/cpu/capability.h"

namespace fisherprune::cpu::max_pool {

// Lanes are the samples of one position of the output, or positions in a row of a
// single sample; and the places of their windows. Steps are entries of the input.
struct Window {
  const void* input;  // of the first lane's first place
  void* output;
  uint8_t* index;
  int64_t lanes, lane_step;
  int64_t rows, columns;  // of places
  int64_t row_step, column_step;
  int64_t first;     // index of the first place
  int64_t kernel_w;  // from the index of a place to that below
};

// The samples of one position of the input, and the windows that hold it.
struct Holders {
  const void* grad;  // the samples of the first window; the next window's follow
  const uint8_t* index;
  void* grad_input;
  int64_t samples;
  int64_t rows, columns;  // of windows
  int64_t row_step;       // entries of the gradient
  int64_t first;          // index of the position in the first window; it falls
  int64_t down, along;    // by these, from a window to the next
};

struct Kernels {
  // By whether entries are bfloat16.
  void (*forward[2])(const Window&);
  void (*backward[2])(const Holders&);
};

const Kernels& kernels(Capability capability);

}  // namespace fisherprune::cpu::max_pool
