// The kernels of lstm in one set of vector instructions; no guard, because kernels.cpp
// includes it once for each, with the macros of vector_body.h.
//
// A product takes a few samples and a panel of columns at a time, whose sums stay in
// registers. Each sum runs over the depth in order, so that its bits are the same
// whatever samples lie beside it.

#include "common/cpu/vector_body.h"
//
#include "common/cpu/entries_body.h"

constexpr int kVectors = FISHERPRUNE_WIDE ? 4 : 2;  // of a panel
constexpr int kRows = 4;                            // of a product at most

// products[r] = row r . weight, of kCount rows.
template <int kCount>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void multiply(const float* rows, int64_t stride,
                                                    const float* panel, int64_t depth,
                                                    float* products, int64_t out) {
  Vec sums[kCount][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k, panel += kVectors * kLanes) {
    Vec columns[kVectors];
    FISHERPRUNE_UNROLL
    for (int v = 0; v < kVectors; ++v) columns[v] = load(panel + v * kLanes);
    FISHERPRUNE_UNROLL
    for (int r = 0; r < kCount; ++r) {
      const Vec entry = all_lanes(rows[r * stride + k]);
      FISHERPRUNE_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[r][v] += entry * columns[v];
    }
  }
  FISHERPRUNE_UNROLL
  for (int r = 0; r < kCount; ++r) FISHERPRUNE_UNROLL
  for (int v = 0; v < kVectors; ++v) store(products + r * out + v * kLanes, sums[r][v]);
}

template <int kCount = kRows>
FISHERPRUNE_TARGET inline void multiply_all(const float* rows, int64_t stride,
                                            const float* panel, int64_t depth,
                                            float* products, int64_t out,
                                            int64_t count) {
  for (; count >= kCount; count -= kCount) {
    multiply<kCount>(rows, stride, panel, depth, products, out);
    rows += kCount * stride, products += kCount * out;
  }
  if constexpr (kCount > 1)
    multiply_all<kCount / 2>(rows, stride, panel, depth, products, out, count);
}

// The products of the task's rows, which lie `stride` apart.
FISHERPRUNE_TARGET inline void multiply(const Task& task, const float* rows,
                                        int64_t stride) {
  constexpr int64_t kColumns = kVectors * kLanes;
  const Packed& w = task.weight;
  for (int64_t p = 0; p < w.panels; ++p)
    multiply_all(rows, stride, w.data + p * w.depth * kColumns, w.depth,
                 task.products + p * kColumns, w.panels * kColumns, task.count);
}

// e^x: 2^n times a polynomial in the rest, as Cephes has it. From 88.4 on it is
// infinite, below -87 what it is there; what is no number stays none.
FISHERPRUNE_TARGET FISHERPRUNE_INLINE Vec exponential(Vec x) {
  const Vec least = all_lanes(-87.0f), most = all_lanes(89.0f);
  x = x < least ? least : x > most ? most : x;
  const Vec shifted = x * 1.44269504f + 12582912.0f;  // n in its lowest bits
  const Vec n = shifted - 12582912.0f;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Words power = (reinterpret_cast<Words>(shifted) << 23) + 0x3f800000u;
  return p * reinterpret_cast<Vec>(power);
}

FISHERPRUNE_TARGET FISHERPRUNE_INLINE Vec sigmoid(Vec x) {
  return 1.0f / (1.0f + exponential(-x));
}

FISHERPRUNE_TARGET FISHERPRUNE_INLINE Vec hyperbolic_tangent(Vec x) {
  const Words sign = reinterpret_cast<Words>(x) & 0x80000000u;
  const Vec size = reinterpret_cast<Vec>(reinterpret_cast<Words>(x) ^ sign);
  const Vec large = 1.0f - 2.0f / (exponential(size + size) + 1.0f);
  const Vec square = x * x;
  Vec p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const Vec small = size + size * square * p;
  const Vec found = size < all_lanes(0.625f) ? small : large;
  return reinterpret_cast<Vec>(reinterpret_cast<Words>(found) | sign);
}

// The gates and states of one sample after a step, from its products.
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void step(const Lstm& s, const float* products,
                                                int64_t sample, int64_t t) {
  const int64_t width = s.shape.width, at = sample * s.shape.steps + t;
  const int64_t before = (at + sample) * width, after = before + width;
  for (int64_t j = 0; j < width; j += kLanes) {
    const int64_t n = width - j;
    Vec gate[4];
    FISHERPRUNE_UNROLL
    for (int k = 0; k < 4; ++k) {
      const int64_t place = k * width + j;
      Vec x = load_some(products + place, n);
      x += load_some(s.ih + at * 4 * width + place, n);
      if (s.bias) x += load_some(s.bias + place, n);
      gate[k] = k == 2 ? hyperbolic_tangent(x) : sigmoid(x);
      store_some(s.gates + at * 4 * width + place, gate[k], n);
    }
    const Vec c = gate[1] * load_some(s.cells + before + j, n) + gate[0] * gate[2];
    const Vec tanh = hyperbolic_tangent(c);
    store_some(s.cells + after + j, c, n);
    store_some(s.tanh + at * width + j, tanh, n);
    store_some(s.hidden + after + j, gate[3] * tanh, n);
  }
}

FISHERPRUNE_TARGET void forward(const Lstm& s, const Task& task) {
  const int64_t width = s.shape.width, stride = (s.shape.steps + 1) * width;
  const int64_t out = task.weight.panels * kVectors * kLanes;
  for (int64_t r = task.first; r < task.first + task.count; ++r)
    for (int64_t j = 0; j < width; ++j) {
      s.hidden[r * stride + j] = s.h0[r * width + j];
      s.cells[r * stride + j] = s.c0[r * width + j];
    }
  for (int64_t t = 0; t < s.shape.steps; ++t) {
    multiply(task, s.hidden + task.first * stride + t * width, stride);
    for (int64_t r = 0; r < task.count; ++r)
      step(s, task.products + r * out, task.first + r, t);
  }
}

// The gradient of one sample's gates at a step. `products` has what came to h from the
// step after, or is null; grad_c0 has what came to c, and gets that of the step before.
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void step_back(const LstmBackward& s,
                                                     const float* products,
                                                     int64_t sample, int64_t t) {
  const int64_t width = s.shape.width, at = sample * s.shape.steps + t;
  const float* const gates = s.gates + at * 4 * width;
  float* const delta = s.delta + at * 4 * width;
  float* const cell = s.grad_c0 + sample * width;
  for (int64_t j = 0; j < width; j += kLanes) {
    const int64_t n = width - j;
    Vec h = load_some(s.grad + at * width + j, n);
    if (products) h += load_some(products + j, n);
    const Vec i = load_some(gates + j, n), f = load_some(gates + width + j, n);
    const Vec g = load_some(gates + 2 * width + j, n);
    const Vec o = load_some(gates + 3 * width + j, n);
    const Vec tanh = load_some(s.tanh + at * width + j, n);
    const Vec before = load_some(s.cells + (at + sample) * width + j, n);
    const Vec c = load_some(cell + j, n) + h * o * (1.0f - tanh * tanh);
    store_some(delta + j, c * g * i * (1.0f - i), n);
    store_some(delta + width + j, c * before * f * (1.0f - f), n);
    store_some(delta + 2 * width + j, c * i * (1.0f - g * g), n);
    store_some(delta + 3 * width + j, h * tanh * o * (1.0f - o), n);
    store_some(cell + j, c * f, n);
  }
}

FISHERPRUNE_TARGET void backward(const LstmBackward& s, const Task& task) {
  const int64_t width = s.shape.width, steps = s.shape.steps, last = task.first;
  const int64_t out = task.weight.panels * kVectors * kLanes, end = last + task.count;
  for (int64_t at = last * width; at < end * width; ++at) s.grad_c0[at] = s.last[at];
  for (int64_t t = steps - 1; t >= 0; --t) {
    for (int64_t r = 0; r < task.count; ++r)
      step_back(s, t == steps - 1 ? nullptr : task.products + r * out, last + r, t);
    multiply(task, s.delta + (last * steps + t) * 4 * width, steps * 4 * width);
  }
  for (int64_t r = 0; r < task.count; ++r)
    for (int64_t j = 0; j < width; ++j)
      s.grad_h0[(last + r) * width + j] = steps ? task.products[r * out + j] : 0.0f;
}

constexpr Kernels kTable = {kVectors * kLanes, forward, backward};
