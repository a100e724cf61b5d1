// The kernel of row_moments in one set of vector instructions; no guard, because
// kernels.cpp includes it once for each, with the macros of vector_body.h.
//
// Four rows are added at a time: the sums are read and written that much less.

#include "common/cpu/vector_body.h"
//
#include "common/cpu/entries_body.h"

// Adds four rows and their squares to the sums of n entries, at most a vector.
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void add_four(const float* row, int64_t stride,
                                                    float* sum, float* sum_sq,
                                                    int64_t n) {
  const Vec a = load_some(row, n), b = load_some(row + stride, n),
            c = load_some(row + 2 * stride, n), d = load_some(row + 3 * stride, n);
  store_some(sum, load_some(sum, n) + ((a + b) + (c + d)), n);
  Vec squares = load_some(sum_sq, n);
  // One product a sum: so compilers fuse them alike for whole vectors and for others.
  squares += a * a;
  squares += b * b;
  squares += c * c;
  squares += d * d;
  store_some(sum_sq, squares, n);
}

FISHERPRUNE_TARGET FISHERPRUNE_INLINE void add_one(const float* row, float* sum,
                                                   float* sum_sq, int64_t n) {
  const Vec a = load_some(row, n);
  store_some(sum, load_some(sum, n) + a, n);
  store_some(sum_sq, load_some(sum_sq, n) + a * a, n);
}

FISHERPRUNE_TARGET void add_rows(const float* rows, int64_t count, int64_t stride,
                                 float* sum, float* sum_sq, int64_t size) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const float* const row = rows + i * stride;
    int64_t p = 0;
    for (; p + kLanes <= size; p += kLanes)
      add_four(row + p, stride, sum + p, sum_sq + p, kLanes);
    if (p < size) add_four(row + p, stride, sum + p, sum_sq + p, size - p);
  }
  for (; i < count; ++i) {
    const float* const row = rows + i * stride;
    int64_t p = 0;
    for (; p + kLanes <= size; p += kLanes)
      add_one(row + p, sum + p, sum_sq + p, kLanes);
    if (p < size) add_one(row + p, sum + p, sum_sq + p, size - p);
  }
}

// The mean of a group's rows, of n entries, at most a vector.
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void mean_of(const float* rows, int64_t count,
                                                   int64_t stride, float* mean,
                                                   int64_t n) {
  Vec even{}, odd{};
  int64_t i = 0;
  for (; i + 2 <= count; i += 2) {
    even += load_some(rows + i * stride, n);
    odd += load_some(rows + (i + 1) * stride, n);
  }
  if (i < count) even += load_some(rows + i * stride, n);
  store_some(mean, (even + odd) / static_cast<float>(count), n);
}

FISHERPRUNE_TARGET void columns(const RowMoments& a, int64_t first, int64_t last) {
  const int64_t size = last - first;
  float *const sum = a.sum + first, *const sum_sq = a.sum_sq + first;
  std::fill(sum, sum + size, 0.0f), std::fill(sum_sq, sum_sq + size, 0.0f);
  if (a.group_size == 1)
    return add_rows(a.rows + first, a.groups, a.stride, sum, sum_sq, size);
  float means[4 * kColumns];
  for (int64_t j = 0; j < a.groups; j += 4) {
    const int64_t some = std::min<int64_t>(4, a.groups - j);
    for (int64_t k = 0; k < some; ++k) {
      const float* const rows = a.rows + (j + k) * a.group_size * a.stride + first;
      for (int64_t p = 0; p < size; p += kLanes)
        mean_of(rows + p, a.group_size, a.stride, means + k * kColumns + p,
                std::min<int64_t>(kLanes, size - p));
    }
    add_rows(means, some, kColumns, sum, sum_sq, size);
  }
}

constexpr Kernels kTable = {columns};
