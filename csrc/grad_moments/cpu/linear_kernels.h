// The vector code of the linear way: one source (linear_body.h), compiled for each set
// of vector instructions, chosen at run time. Free of torch.
#pragma once

#include <cstdint>

#include "common/cpu/capability.h"

namespace fisherprune::cpu::grad_moments::linear {

// What one call multiplies: a panel of the input and some outputs of one of the
// gradient, packed as [position][lane]; and where their moments are.
struct Operands {
  const float* input;
  const float* grad;
  const float* grad_sq;       // the squares of the gradient, where they are needed
  int64_t grad_width;         // floats from one position of the gradient to the next
  float *sum, *sum_sq;        // of the first output and the panel's first channel
  int64_t stride;             // from one output to the next
  int64_t outputs, channels;  // of them that exist
};

// Consecutive positions: `count` groups of `size` positions, then one of `rest`, which
// may be 0; and one over the samples of each.
struct Groups {
  int64_t count, size, rest;
  float scale, rest_scale;
  int64_t in_all() const { return count + (rest > 0); }
  int64_t size_of(int64_t group) const { return group < count ? size : rest; }
  float scale_of(int64_t group) const { return group < count ? scale : rest_scale; }
};

// Adds the moments of some outputs and a panel of channels.
using Kernel = void (*)(const Operands& operands, const Groups& groups);

struct KernelOf {
  int64_t panel;    // channels of a panel of the input
  int64_t outputs;  // of one call
  Kernel run;
};

constexpr int kSizes = 3;

// Any multiple of it is a number of whole calls of the kernels of groups of several
// positions, in each set of vector instructions.
constexpr int64_t kFewestOutputs = 4;

struct Kernels {
  KernelOf products;      // groups of one position: G = d a, G * G = d^2 a^2
  KernelOf short_groups;  // G = scale * sum of d a; moments in registers
  // The same with more sums in registers and moments in memory, for panels of full and
  // of half width, and for few to many outputs.
  KernelOf long_groups[2][kSizes];
  // Adds rows of a tile to rows of `channels` floats that lie `stride` apart.
  void (*add)(const float* tile, int64_t width, int64_t rows, int64_t channels,
              float* to, int64_t stride);
};

const Kernels& kernels(Capability capability);

}  // namespace fisherprune::cpu::grad_moments::linear
