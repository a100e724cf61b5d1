// Sparse convolutions on the CPU, free of torch: tests compile them alone.
#pragma once

#include "common/cpu/capability.h"
#include "common/cpu/parallel.h"
#include "sparse_conv/contract.h"

namespace fisherprune::cpu::sparse_conv {

// The threads decide into how many tasks work is dealt, never the result.
struct Machine {
  Capability capability;
  const Parallel& parallel;
  int64_t threads;
};

// output: [O, P, Q, N] in memory.
void output(const SparseConvShape& s, const View4& input, const Pattern& pattern,
            const float* values, const Epilogue& epilogue, void* output,
            const Machine& machine);

// grad_input: [C, H, W, N] in memory.
void input_gradient(const SparseConvShape& s, const View4& grad, const Pattern& pattern,
                    const float* values, void* grad_input, const Machine& machine);

// grad_values: [count]
void values_gradient(const SparseConvShape& s, const View4& input, const View4& grad,
                     const Pattern& pattern, float* grad_values,
                     const Machine& machine);

}  // namespace fisherprune::cpu::sparse_conv
