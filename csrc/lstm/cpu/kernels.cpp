// Who does what. A task owns some samples and takes all their steps: samples never wait
// for each other. Its products at a step read the weight's panels from a cache.
//
// Memory traffic. The weight is packed once in a call. Forward reads ih once and writes
// states and gates; backward reads gradient, states and gates and writes the gradient
// of ih.
#include "lstm/cpu/kernels.h"

#include <algorithm>

#include "common/cpu/floats.h"
#include "common/cpu/half_float.h"
#include "common/cpu/unroll.h"
#include "common/integers.h"

namespace fisherprune::cpu::lstm {

#define FISHERPRUNE_BODY "lstm/cpu/body.h"
#include "common/cpu/each_capability.h"

const Kernels& kernels(Capability capability) { return table_of(capability); }

namespace {

constexpr int64_t kSamples = 16;  // of a task

// A matrix whose entry [k, j] lies at k * down + j * along.
struct Matrix {
  const float* data;
  int64_t depth, columns, down, along;
};

Packed packed(const Matrix& m, int64_t columns, const Parallel& parallel) {
  const int64_t panels = ceil_div(m.columns, columns);
  float* const data = shared_floats(panels * m.depth * columns);
  for_each_task(parallel, panels, [&](int64_t panel) {
    float* const to = data + panel * m.depth * columns;
    const float* const from = m.data + panel * columns * m.along;
    const int64_t n = std::min(columns, m.columns - panel * columns);
    if (n < columns) std::fill(to, to + m.depth * columns, 0.0f);
    if (m.down == 1)
      for (int64_t j = 0; j < n; ++j)
        for (int64_t k = 0; k < m.depth; ++k)
          to[k * columns + j] = from[k + j * m.along];
    else
      for (int64_t k = 0; k < m.depth; ++k)
        for (int64_t j = 0; j < n; ++j) to[k * columns + j] = from[k * m.down + j];
  });
  return {data, m.depth, panels};
}

template <class Call>
void run(const Call& lstm, void (*kernel)(const Call&, const Task&),
         const Packed& weight, int64_t columns, const Parallel& parallel) {
  const int64_t samples = lstm.shape.samples;
  for_each_task(parallel, ceil_div(samples, kSamples), [&](int64_t task) {
    const int64_t first = task * kSamples, count = std::min(kSamples, samples - first);
    float* const products = scratch_floats(count * weight.panels * columns);
    kernel(lstm, {first, count, weight, products});
  });
}

}  // namespace

void forward(const Lstm& lstm, Capability capability, const Parallel& parallel) {
  const Kernels& code = kernels(capability);
  const int64_t width = lstm.shape.width;
  const Matrix matrix{lstm.weight, width, 4 * width, 1, width};
  const Packed weight = packed(matrix, code.columns, parallel);
  run(lstm, code.forward, weight, code.columns, parallel);
}

void backward(const LstmBackward& lstm, Capability capability,
              const Parallel& parallel) {
  const Kernels& code = kernels(capability);
  const int64_t width = lstm.shape.width;
  const Matrix matrix{lstm.weight, 4 * width, width, width, 1};
  const Packed weight = packed(matrix, code.columns, parallel);
  run(lstm, code.backward, weight, code.columns, parallel);
}

}  // namespace fisherprune::cpu::lstm
