// The linear way's kernels in one set of vector instructions; no guard, because
// linear_kernels.cpp includes it once for each, with the macros of vector_body.h.
//
// Lanes are channels of the input: moments lie in registers as they do in the
// accumulators, and are added there without being transposed. Per position a call loads
// V vectors of the input and R numbers of the gradient for R * V multiply-adds.

#include "common/cpu/vector_body.h"

FISHERPRUNE_TARGET FISHERPRUNE_INLINE Vec broadcast(const float* from) {
  return *from - Vec{};  // minus, because x + 0 is not x for x = -0
}

template <int R, int V>
FISHERPRUNE_INLINE void prefetch(const Operands& o) {
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V * kLanes; v += 16) {
      __builtin_prefetch(o.sum + r * o.stride + v, 1);
      __builtin_prefetch(o.sum_sq + r * o.stride + v, 1);
    }
}

// Adds moments [output][vector] to an accumulator, those of outputs and channels that
// exist.
template <int R, int V>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void add(const Operands& o, const Vec* moments,
                                               float* to) {
  if (o.outputs >= R && o.channels >= V * kLanes) {
    FISHERPRUNE_UNROLL
    for (int i = 0; i < R * V; ++i) {
      float* const at = to + i / V * o.stride + i % V * kLanes;
      store(at, load(at) + moments[i]);
    }
    return;
  }
  alignas(64) float all[R * V * kLanes];
  FISHERPRUNE_UNROLL
  for (int i = 0; i < R * V; ++i) store(all + i * kLanes, moments[i]);
  for (int64_t r = 0; r < R && r < o.outputs; ++r)
    for (int64_t c = 0; c < V * kLanes && c < o.channels; ++c)
      to[r * o.stride + c] += all[r * V * kLanes + c];
}

template <int R, int V>
FISHERPRUNE_TARGET void products(const Operands& o, const Groups& groups) {
  prefetch<R, V>(o);
  Vec first[R * V], second[R * V];
  FISHERPRUNE_UNROLL
  for (int i = 0; i < R * V; ++i) first[i] = second[i] = Vec{};
  const float *a = o.input, *d = o.grad, *d_sq = o.grad_sq;
  for (int64_t t = 0; t < groups.count; ++t) {
    Vec x[V];
    FISHERPRUNE_UNROLL
    for (int v = 0; v < V; ++v) x[v] = load(a + v * kLanes);
    FISHERPRUNE_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec y = broadcast(d + r);
      FISHERPRUNE_UNROLL
      for (int v = 0; v < V; ++v) first[r * V + v] += x[v] * y;
    }
    FISHERPRUNE_UNROLL
    for (int v = 0; v < V; ++v) x[v] *= x[v];
    FISHERPRUNE_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec y = broadcast(d_sq + r);
      FISHERPRUNE_UNROLL
      for (int v = 0; v < V; ++v) second[r * V + v] += x[v] * y;
    }
    a += V * kLanes, d += o.grad_width, d_sq += o.grad_width;
  }
  add<R, V>(o, first, o.sum);
  add<R, V>(o, second, o.sum_sq);
}

// One position; the first of a group begins its sums.
template <int R, int V, bool kFirst>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void multiply(const float* a, const float* d,
                                                    Vec* sums) {
  Vec x[V];
  FISHERPRUNE_UNROLL
  for (int v = 0; v < V; ++v) x[v] = load(a + v * kLanes);
  FISHERPRUNE_UNROLL
  for (int r = 0; r < R; ++r) {
    const Vec y = broadcast(d + r);
    FISHERPRUNE_UNROLL
    for (int v = 0; v < V; ++v)
      sums[r * V + v] = kFirst ? x[v] * y : sums[r * V + v] + x[v] * y;
  }
}

template <int R, int V>
FISHERPRUNE_TARGET void groups(const Operands& o, const Groups& groups) {
  prefetch<R, V>(o);
  Vec first[R * V], second[R * V];
  FISHERPRUNE_UNROLL
  for (int i = 0; i < R * V; ++i) first[i] = second[i] = Vec{};
  const float *a = o.input, *d = o.grad;
  const int64_t all = groups.count + (groups.rest > 0);
  for (int64_t g = 0; g < all; ++g) {
    const int64_t size = g < groups.count ? groups.size : groups.rest;
    const float scale = g < groups.count ? groups.scale : groups.rest_scale;
    Vec sums[R * V];
    multiply<R, V, true>(a, d, sums);
    a += V * kLanes, d += o.grad_width;
    for (int64_t t = 1; t < size; ++t, a += V * kLanes, d += o.grad_width)
      multiply<R, V, false>(a, d, sums);
    if (scale != 1.f) {
      FISHERPRUNE_UNROLL
      for (int i = 0; i < R * V; ++i) sums[i] *= scale;
    }
    FISHERPRUNE_UNROLL
    for (int i = 0; i < R * V; ++i) {
      first[i] += sums[i];
      second[i] += sums[i] * sums[i];
    }
  }
  add<R, V>(o, first, o.sum);
  add<R, V>(o, second, o.sum_sq);
}

#if FISHERPRUNE_WIDE
constexpr Kernels kTable = {2 * kLanes, 6, 4, products<6, 2>, groups<4, 2>};
#else
constexpr Kernels kTable = {2 * kLanes, 3, 2, products<3, 2>, groups<2, 2>};
#endif
