// The micro-kernels in one set of vector instructions; no guard, because
// microkernel.cpp includes it once for each, with the macros of vector_body.h.
//
// One call of micro_tile runs over all samples of a block for R rows of the patch and V
// vectors of outputs. Its R * V sums stay in registers; per position it loads V vectors
// of the packed gradient and R numbers of the packed input for R * V multiply-adds.

#include "common/cpu/vector_body.h"

template <int V, bool kOwn>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void multiply_add(const float* a, const Vec* d,
                                                        Vec* acc) {
  Vec x;
  if constexpr (kOwn)
    x = load(a);
  else
    x = *a - Vec{};  // in every lane (minus, because x + 0 is not x for x = -0)
  FISHERPRUNE_UNROLL
  for (int v = 0; v < V; ++v) acc[v] += x * d[v];
}

// acc = sum over a run of listed positions, or of all
template <int R, int V, bool kOwn, bool kListed>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void sum_run(const Column& column,
                                                   const float* const* a,
                                                   const Run& run, Vec* acc) {
  FISHERPRUNE_UNROLL
  for (int i = 0; i < R * V; ++i) acc[i] = Vec{};
  const float* grad = column.grad + int64_t{run.begin} * (V * kLanes);
  for (int64_t t = run.begin; t < run.end; ++t, grad += V * kLanes) {
    if constexpr (kListed)
      grad = column.grad + int64_t{column.position[t]} * (V * kLanes);
    const int64_t at = column.offset[t];
    Vec d[V];
    FISHERPRUNE_UNROLL
    for (int v = 0; v < V; ++v) d[v] = load(grad + v * kLanes);
    FISHERPRUNE_UNROLL
    for (int r = 0; r < R; ++r) multiply_add<V, kOwn>(a[r] + at, d, acc + r * V);
  }
}

// Groups of one sample, the usual case, need no multiplication.
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void scale(const Run& run, Vec* acc, int n) {
  if (run.scale == 1.f) return;
  FISHERPRUNE_UNROLL
  for (int i = 0; i < n; ++i) acc[i] *= run.scale;
}

// Where vector i of a micro-tile lies in a tile of moments.
template <int V>
FISHERPRUNE_INLINE int64_t place(int i, int64_t row_stride) {
  return i / V * row_stride + i % V * kLanes;
}

// Adds the sums of a run to the carry, or, where the group ends, to the moments.
template <int R, int V>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void end_run(const Run& run, Vec* acc,
                                                   int64_t row_stride, float* sum,
                                                   float* sum_sq, float* carry) {
  constexpr int n = R * V;
  if (run.continues) {
    FISHERPRUNE_UNROLL
    for (int i = 0; i < n; ++i) acc[i] += load(carry + i * kLanes);
  }
  if (!run.finishes) {
    FISHERPRUNE_UNROLL
    for (int i = 0; i < n; ++i) store(carry + i * kLanes, acc[i]);
    return;
  }
  scale(run, acc, n);
  FISHERPRUNE_UNROLL
  for (int i = 0; i < n; ++i) {
    float* const at = sum + place<V>(i, row_stride);
    store(at, load(at) + acc[i]);
  }
  if (sum_sq == nullptr) return;
  FISHERPRUNE_UNROLL
  for (int i = 0; i < n; ++i) {
    float* const at = sum_sq + place<V>(i, row_stride);
    store(at, load(at) + acc[i] * acc[i]);
  }
}

template <int R, int V, bool kOwn>
FISHERPRUNE_TARGET void micro_tile(const Column& column, const int64_t* base,
                                   float* sum, float* sum_sq, float* carry) {
  const float* a[R];
  for (int r = 0; r < R; ++r) a[r] = column.input + base[r];
  for (int64_t i = 0; i < column.run_count; ++i) {
    const Run& run = column.runs[i];
    Vec acc[R * V];
    sum_run<R, V, kOwn, false>(column, a, run, acc);
    end_run<R, V>(run, acc, column.row_stride, sum, sum_sq, carry);
  }
}

// The same for short runs that are whole groups. It keeps the tile's moments in
// registers, too: they would otherwise be loaded and stored about as often as sums are
// multiplied. The additions have the same order.
template <int R, int V>
FISHERPRUNE_TARGET void short_micro_tile(const Column& column, const int64_t* base,
                                         float* sum, float* sum_sq, float*) {
  const float* a[R];
  for (int r = 0; r < R; ++r) a[r] = column.input + base[r];
  Vec first[R * V], second[R * V];
  FISHERPRUNE_UNROLL
  for (int i = 0; i < R * V; ++i) first[i] = load(sum + place<V>(i, column.row_stride));
  FISHERPRUNE_UNROLL
  for (int i = 0; i < R * V; ++i)
    second[i] = load(sum_sq + place<V>(i, column.row_stride));
  for (int64_t i = 0; i < column.run_count; ++i) {
    const Run& run = column.runs[i];
    Vec acc[R * V];
    sum_run<R, V, false, true>(column, a, run, acc);
    scale(run, acc, R * V);
    FISHERPRUNE_UNROLL
    for (int j = 0; j < R * V; ++j) first[j] += acc[j], second[j] += acc[j] * acc[j];
  }
  FISHERPRUNE_UNROLL
  for (int i = 0; i < R * V; ++i) store(sum + place<V>(i, column.row_stride), first[i]);
  FISHERPRUNE_UNROLL
  for (int i = 0; i < R * V; ++i)
    store(sum_sq + place<V>(i, column.row_stride), second[i]);
}

template <bool kAdd>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void transpose_full(const float* from,
                                                          int64_t from_stride,
                                                          float* to,
                                                          int64_t to_stride) {
  Vec x[kLanes];
  FISHERPRUNE_UNROLL
  for (int i = 0; i < kLanes; ++i) x[i] = load(from + i * from_stride);
  transpose_square(x);
  FISHERPRUNE_UNROLL
  for (int i = 0; i < kLanes; ++i) {
    float* row = to + i * to_stride;
    store(row, kAdd ? load(row) + x[i] : x[i]);
  }
}

// Fewer rows than a square has.
template <bool kAdd>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void transpose_rows(const float* from,
                                                          int64_t from_stride,
                                                          int64_t rows, float* to,
                                                          int64_t to_stride) {
  Vec x[kLanes];
  for (int i = 0; i < kLanes; ++i)
    x[i] = i < rows ? load(from + i * from_stride) : Vec{};
  transpose_square(x);
  for (int i = 0; i < kLanes; ++i) {
    float* const row = to + i * to_stride;
    for (int64_t j = 0; j < rows; ++j) row[j] = kAdd ? row[j] + x[i][j] : x[i][j];
  }
}

// Square by square; the columns that are left over, entry by entry.
template <bool kAdd>
FISHERPRUNE_TARGET void transpose_any(const float* from, int64_t from_stride,
                                      int64_t rows, int64_t cols, float* to,
                                      int64_t to_stride) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t c = 0; c < cols; c += kLanes) {
      const float* source = from + r * from_stride + c;
      float* target = to + c * to_stride + r;
      const int64_t m = rows - r < kLanes ? rows - r : kLanes;
      const int64_t n = cols - c < kLanes ? cols - c : kLanes;
      if (n == kLanes) {
        if (m == kLanes)
          transpose_full<kAdd>(source, from_stride, target, to_stride);
        else
          transpose_rows<kAdd>(source, from_stride, m, target, to_stride);
        continue;
      }
      for (int64_t j = 0; j < n; ++j)
        for (int64_t i = 0; i < m; ++i) {
          const float x = source[i * from_stride + j];
          float& y = target[j * to_stride + i];
          y = kAdd ? y + x : x;
        }
    }
}

#include "grad_moments/cpu/winograd_body.h"

constexpr Microkernels kTable = {
    kLanes,
#if FISHERPRUNE_WIDE
    4,
    {{},
     {12, micro_tile<12, 1, false>},
     {12, micro_tile<12, 2, false>},
     {6, micro_tile<6, 3, false>},
     {6, micro_tile<6, 4, false>}},
#else
    2,
    {{}, {12, micro_tile<12, 1, false>}, {6, micro_tile<6, 2, false>}, {}, {}},
#endif
    {9, micro_tile<9, 1, true>},
#if FISHERPRUNE_WIDE
    2,
    {{}, {8, short_micro_tile<8, 1>}, {4, short_micro_tile<4, 2>}},
#else
    0,
    {},
#endif
    transpose_any<false>,
    transpose_any<true>,
#if FISHERPRUNE_WIDE
    {4,
     4,
     {nullptr, winograd_tile<4, 1>, winograd_tile<4, 2>, winograd_tile<4, 3>,
      winograd_tile<4, 4>},
#else
    {4,
     2,
     {nullptr, winograd_tile<4, 1>, winograd_tile<4, 2>},
#endif
     transform<kReach, times_b>,
     transform<kEdge, times_g>,
     any_small},
};
