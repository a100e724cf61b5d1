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

// The mean over a group of its products.
template <int R, int V>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void sum_group(const float* a, const float* d,
                                                     int64_t grad_width, int64_t size,
                                                     float scale, Vec* sums) {
  multiply<R, V, true>(a, d, sums);
  for (int64_t t = 1; t < size; ++t)
    multiply<R, V, false>(a += V * kLanes, d += grad_width, sums);
  if (scale == 1.f) return;
  FISHERPRUNE_UNROLL
  for (int i = 0; i < R * V; ++i) sums[i] *= scale;
}

// Groups of few positions: their moments stay in registers.
template <int R, int V>
FISHERPRUNE_TARGET void short_groups(const Operands& o, const Groups& groups) {
  prefetch<R, V>(o);
  Vec first[R * V], second[R * V];
  FISHERPRUNE_UNROLL
  for (int i = 0; i < R * V; ++i) first[i] = second[i] = Vec{};
  const float *a = o.input, *d = o.grad;
  for (int64_t g = 0; g < groups.in_all(); ++g) {
    const int64_t size = groups.size_of(g);
    Vec sums[R * V];
    sum_group<R, V>(a, d, o.grad_width, size, groups.scale_of(g), sums);
    a += size * (V * kLanes), d += size * o.grad_width;
    FISHERPRUNE_UNROLL
    for (int i = 0; i < R * V; ++i) {
      first[i] += sums[i];
      second[i] += sums[i] * sums[i];
    }
  }
  add<R, V>(o, first, o.sum);
  add<R, V>(o, second, o.sum_sq);
}

// Groups of many positions: more sums in registers. The moments are of a tile as wide
// as the panel, all of whose outputs and channels exist.
template <int R, int V>
FISHERPRUNE_TARGET void long_groups(const Operands& o, const Groups& groups) {
  const float *a = o.input, *d = o.grad;
  for (int64_t g = 0; g < groups.in_all(); ++g) {
    const int64_t size = groups.size_of(g);
    Vec sums[R * V];
    sum_group<R, V>(a, d, o.grad_width, size, groups.scale_of(g), sums);
    a += size * (V * kLanes), d += size * o.grad_width;
    FISHERPRUNE_UNROLL
    for (int i = 0; i < R * V; ++i)
      store(o.sum + i * kLanes, load(o.sum + i * kLanes) + sums[i]);
    FISHERPRUNE_UNROLL
    for (int i = 0; i < R * V; ++i)
      store(o.sum_sq + i * kLanes, load(o.sum_sq + i * kLanes) + sums[i] * sums[i]);
  }
}

FISHERPRUNE_TARGET void add_rows(const float* tile, int64_t width, int64_t rows,
                                 int64_t channels, float* to, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r, tile += width, to += stride) {
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes)
      store(to + c, load(to + c) + load(tile + c));
    for (; c < channels; ++c) to[c] += tile[c];
  }
}

template <int R, int V>
constexpr KernelOf long_of() {
  return {V * kLanes, R, long_groups<R, V>};
}

#if FISHERPRUNE_WIDE
constexpr Kernels kTable = {{2 * kLanes, 6, products<6, 2>},
                            {2 * kLanes, 4, short_groups<4, 2>},
                            {{long_of<2, 4>(), long_of<4, 4>(), long_of<6, 4>()},
                             {long_of<4, 2>(), long_of<8, 2>(), long_of<12, 2>()}},
                            add_rows};
#else
constexpr Kernels kTable = {{2 * kLanes, 3, products<3, 2>},
                            {2 * kLanes, 2, short_groups<2, 2>},
                            {{long_of<2, 2>(), long_of<4, 2>(), long_of<6, 2>()},
                             {long_of<4, 1>(), long_of<8, 1>(), long_of<12, 1>()}},
                            add_rows};
#endif
