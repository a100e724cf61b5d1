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

// The positions of a block: `count` groups of `size` positions, then one of `rest`,
// which may be 0; and one over the samples of each.
struct Groups {
  int64_t count, size, rest;
  float scale, rest_scale;
};

// Adds the moments of some outputs and a panel of channels.
using Kernel = void (*)(const Operands& operands, const Groups& groups);

struct Kernels {
  int64_t panel;            // channels of one panel of the input
  int64_t product_outputs;  // of one call of products
  int64_t group_outputs;    // of one call of groups
  Kernel products;          // groups of one position: G = d a, G * G = d^2 a^2
  Kernel groups;            // G = scale * sum of d a
};

const Kernels& kernels(Capability capability);

}  // namespace fisherprune::cpu::grad_moments::linear
