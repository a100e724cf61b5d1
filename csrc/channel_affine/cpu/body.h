// The kernel in one set of vector instructions; no guard, because kernels.cpp includes
// it once for each, with the macros of vector_body.h.

#include "common/cpu/vector_body.h"

FISHERPRUNE_TARGET FISHERPRUNE_INLINE float added(Vec values) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += values[i];
  return sum;
}

// One channel of one sample: d times factor, and the sums of d (x - mean) and of d.
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void row(const float* d, const float* x,
                                               int64_t count, float mean, float factor,
                                               float* to, double& product,
                                               double& sum) {
  constexpr int64_t kRun = 64 * kLanes;  // positions that are added up in float32
  int64_t t = 0;
  while (t + kLanes <= count) {
    const int64_t end = count - t < kRun ? count : t + kRun;
    Vec products{}, sums{};
    for (; t + kLanes <= end; t += kLanes) {
      const Vec g = load(d + t);
      products += g * (load(x + t) - mean), sums += g;
      store(to + t, g * factor);
    }
    product += added(products), sum += added(sums);
  }
  float products = 0, sums = 0;
  for (; t < count; ++t) {
    products += d[t] * (x[t] - mean), sums += d[t];
    to[t] = d[t] * factor;
  }
  product += products, sum += sums;
}

FISHERPRUNE_TARGET void rows(const ChannelAffineBackward& a, int64_t first,
                             int64_t last) {
  const int64_t count = a.positions;
  int64_t c = first % a.channels;
  for (int64_t i = first; i < last; ++i, c = c + 1 == a.channels ? 0 : c + 1) {
    double product = 0, sum = 0;
    row(a.grad + i * count, a.input + i * count, count, a.mean[c], a.factor[c],
        a.input_grad + i * count, product, sum);
    a.weight_grad[i] = static_cast<float>(product * a.scale[c]);
    a.bias_grad[i] = static_cast<float>(sum);
  }
}

constexpr Kernels kTable = {rows};
