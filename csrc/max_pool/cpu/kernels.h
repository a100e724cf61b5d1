// The vector code of max_pool2d: one source (body.h), compiled for each set of vector
// instructions, chosen at run time. Free of torch.
#pragma once

#include <cstdint>

#include "common/cpu/capability.h"

namespace fisherprune::cpu::max_pool {

// The lanes of one position of the output, and the places of its window. Steps are
// entries of the input.
struct Window {
  const void* input;  // of the first place
  void* output;
  uint8_t* index;
  int64_t lanes;
  int64_t rows, columns;  // of places
  int64_t row_step;
  int64_t first;     // index of the first place
  int64_t kernel_w;  // from the index of a place to that below
};

// The lanes of one position of the input, and the windows that hold it.
struct Holders {
  const void* grad;  // the lanes of the first window; the next window's follow
  const uint8_t* index;
  void* grad_input;
  int64_t lanes;
  int64_t rows, columns;  // of windows
  int64_t row_step;       // entries of the gradient
  int64_t first;          // index of the position in the first window; it falls
  int64_t down, along;    // by these, from a window to the next
};

// A matrix, and where its transpose goes. Strides are entries.
struct Matrix {
  int64_t rows, columns;
  const void* from;
  int64_t from_stride;
  void* to;
  int64_t to_stride;
};

struct Kernels {
  // By whether entries are bfloat16.
  void (*forward[2])(const Window&);
  void (*backward[2])(const Holders&);
  void (*transpose[2])(const Matrix&);
  void (*transpose_bytes)(const Matrix&);
};

const Kernels& kernels(Capability capability);

}  // namespace fisherprune::cpu::max_pool
