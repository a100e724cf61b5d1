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

// As many channels of one sample as kVectors hold, from `first` on, which lie side by
// side at each position. The last vector ends with the last channel and may repeat some
// of the one before: there are at least kLanes channels.
template <int kVectors>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void columns(const ChannelAffineBackward& a,
                                                   int64_t sample, int64_t first) {
  const int64_t channels = a.channels, all = sample * a.positions * channels;
  constexpr int64_t kRun = 64;  // positions that are added up in float32
  int64_t at[kVectors];
  Vec mean[kVectors], factor[kVectors];
  double product[kVectors][kLanes] = {}, sum[kVectors][kLanes] = {};
  FISHERPRUNE_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    const int64_t c = first + v * kLanes;
    at[v] = c + kLanes <= channels ? c : channels - kLanes;
    mean[v] = load(a.mean + at[v]), factor[v] = load(a.factor + at[v]);
  }
  for (int64_t t = 0; t < a.positions;) {
    const int64_t end = a.positions - t < kRun ? a.positions : t + kRun;
    Vec products[kVectors] = {}, sums[kVectors] = {};
    for (; t < end; ++t) {
      const int64_t row = all + t * channels;
      FISHERPRUNE_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const Vec d = load(a.grad + row + at[v]);
        products[v] += d * (load(a.input + row + at[v]) - mean[v]), sums[v] += d;
        store(a.input_grad + row + at[v], d * factor[v]);
      }
    }
    for (int v = 0; v < kVectors; ++v)
      for (int i = 0; i < kLanes; ++i)
        product[v][i] += products[v][i], sum[v][i] += sums[v][i];
  }
  for (int v = 0; v < kVectors; ++v)
    for (int i = 0; i < kLanes; ++i) {
      const int64_t c = at[v] + i, own = sample * channels + c;
      a.weight_grad[own] = static_cast<float>(product[v][i] * a.scale[c]);
      a.bias_grad[own] = static_cast<float>(sum[v][i]);
    }
}

// The channels of one sample, fewer than kLanes.
FISHERPRUNE_TARGET void few_columns(const ChannelAffineBackward& a, int64_t sample) {
  const int64_t channels = a.channels, all = sample * a.positions * channels;
  double product[kLanes] = {}, sum[kLanes] = {};
  for (int64_t t = 0; t < a.positions; ++t)
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = all + t * channels + c;
      product[c] += a.grad[i] * (a.input[i] - a.mean[c]), sum[c] += a.grad[i];
      a.input_grad[i] = a.grad[i] * a.factor[c];
    }
  for (int64_t c = 0; c < channels; ++c) {
    a.weight_grad[sample * channels + c] = static_cast<float>(product[c] * a.scale[c]);
    a.bias_grad[sample * channels + c] = static_cast<float>(sum[c]);
  }
}

FISHERPRUNE_TARGET void blocks(const ChannelAffineBackward& a, int64_t first,
                               int64_t last) {
  const int64_t of_sample = blocks_of(a.channels);
  for (int64_t i = first; i < last; ++i) {
    const int64_t sample = i / of_sample;
    if (a.channels < kLanes) {
      few_columns(a, sample);
      continue;
    }
    const int64_t block = i % of_sample;
    int64_t c = block * kBlock;
    const int64_t end = block + 1 < of_sample ? c + kBlock : a.channels;
    while (c < end) {
      const int64_t vectors = ceil_div(end - c, int64_t{kLanes});
      if (vectors >= 4)
        columns<4>(a, sample, c), c += 4 * kLanes;
      else if (vectors == 3)
        columns<3>(a, sample, c), c += 3 * kLanes;
      else if (vectors == 2)
        columns<2>(a, sample, c), c += 2 * kLanes;
      else
        columns<1>(a, sample, c), c += kLanes;
    }
  }
}

constexpr Kernels kTable = {rows, blocks};
