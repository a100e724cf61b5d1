// The output of few samples, of one image above all.
#pragma once

#include "common/view.h"
#include "sparse_conv/contract.h"
#include "sparse_conv/cpu/core.h"

namespace fisherprune::cpu::sparse_conv {

// Whether few_output makes it faster: of fewer samples than a chunk has, in float32, by
// kernels of few columns.
bool is_few(const SparseConvShape& s, const View4& input);

// output: [O, P, Q, N] in memory.
void few_output(const SparseConvShape& s, const View4& input, const Pattern& pattern,
                const float* values, const Epilogue& epilogue, float* output,
                const Machine& machine);

}  // namespace fisherprune::cpu::sparse_conv
