// The narrow way's kernels in one set of vector instructions; no guard, because
// narrow_kernels.cpp includes it once for each, with the macros of vector_body.h.
//
// One call of multiply runs over the places of a packed plane: each lane has a place of
// its own. Its R * V sums stay in registers; per vector of places it loads R vectors of
// the input, at any address, and V of the gradient for R * V multiply-adds.

#include "common/cpu/vector_body.h"

template <int R, int V>
FISHERPRUNE_TARGET void multiply(const float* input, const int64_t* base,
                                 const float* grad, int64_t grad_step, int64_t length,
                                 float* sums, int64_t sums_step, bool add) {
  const float* a[R];
  FISHERPRUNE_UNROLL
  for (int r = 0; r < R; ++r) a[r] = input + base[r];
  Vec acc[R * V];
  FISHERPRUNE_UNROLL
  for (int i = 0; i < R * V; ++i) acc[i] = Vec{};
  for (int64_t t = 0; t < length; t += kLanes) {
    Vec d[V];
    FISHERPRUNE_UNROLL
    for (int v = 0; v < V; ++v) d[v] = load(grad + v * grad_step + t);
    FISHERPRUNE_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec x = load(a[r] + t);
      FISHERPRUNE_UNROLL
      for (int v = 0; v < V; ++v) acc[r * V + v] += x * d[v];
    }
  }
  FISHERPRUNE_UNROLL
  for (int r = 0; r < R; ++r) FISHERPRUNE_UNROLL
  for (int v = 0; v < V; ++v) {
    float* const to = sums + v * sums_step + r * kLanes;
    store(to, add ? load(to) + acc[r * V + v] : acc[r * V + v]);
  }
}

// The sum over the lanes of each of a square of vectors, in order. Every round adds
// halves: lane i of a and of b to lane i + lanes / 2, side by side.
template <int kCount = kLanes>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE Vec sums_of_lanes(const Vec* x) {
  if constexpr (kCount == 1) {
    return x[0];
  } else {
    Vec y[kCount / 2];
    FISHERPRUNE_UNROLL
    for (int i = 0; i < kCount / 2; ++i)
      y[i] = zip_low(x[i], x[i + kCount / 2]) + zip_high(x[i], x[i + kCount / 2]);
    return sums_of_lanes<kCount / 2>(y);
  }
}

FISHERPRUNE_TARGET inline void add_moments(const float* sums, int64_t count,
                                           float scale, float* sum, float* sum_sq) {
  for (int64_t i = 0; i < count; i += kLanes, sums += kLanes * kLanes) {
    Vec x[kLanes];
    FISHERPRUNE_UNROLL
    for (int j = 0; j < kLanes; ++j) x[j] = load(sums + j * kLanes);
    const Vec g = sums_of_lanes(x) * scale;
    store(sum + i, load(sum + i) + g);
    store(sum_sq + i, load(sum_sq + i) + g * g);
  }
}

// The even lanes of 2 * lanes floats without the last of them, which is not read.
FISHERPRUNE_TARGET FISHERPRUNE_INLINE Vec load_even(const float* from) {
  return every_second(load(from), load(from + kLanes - 1));
}

// One row, by two overlapping pieces of n / 2 < kFloats <= n where it is short.
template <int kFloats>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void copy_ends(const float* from, int64_t n,
                                                     float* to) {
  std::memcpy(to, from, 4 * kFloats);
  std::memcpy(to + n - kFloats, from + n - kFloats, 4 * kFloats);
}

FISHERPRUNE_TARGET FISHERPRUNE_INLINE void copy_row(const float* from, int64_t n,
                                                    float* to) {
  if (n >= kLanes) {
    for (int64_t i = 0; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
    store(to + n - kLanes, load(from + n - kLanes));
  } else if (n >= 8) {
    copy_ends<8>(from, n, to);
  } else if (n >= 4) {
    copy_ends<4>(from, n, to);
  } else {
    for (int64_t i = 0; i < n; ++i) std::memcpy(to + i, from + i, 4);
  }
}

FISHERPRUNE_TARGET FISHERPRUNE_INLINE void copy_even(const float* from, int64_t n,
                                                     float* to) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load_even(from + 2 * i));
  for (; i < n; ++i) to[i] = from[2 * i];
}

template <class T>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void copy_row(const T* from, int64_t n,
                                                    float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i]);
}

template <class T>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void copy_even(const T* from, int64_t n,
                                                     float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[2 * i]);
}

template <class T, class CopyRow>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void for_each_row(const Rows& rows,
                                                        const Place& to,
                                                        const CopyRow& copy) {
  for (int64_t c = 0; c < rows.channels; ++c) {
    const T* from = static_cast<const T*>(rows.first) + c * rows.channel_stride;
    float* row = to.first + c * to.channel_stride;
    for (int64_t i = 0; i < rows.rows; ++i, from += rows.row_stride, row += to.pitch) {
      __builtin_prefetch(from + rows.ahead);
      copy(from, row);
    }
  }
}

template <class T>
FISHERPRUNE_TARGET void copy_rows_of(const Rows& rows, const Place& to) {
  const int64_t n = rows.cols, step = rows.step;
  const bool short_floats = std::is_same_v<T, float> && step == 1 && n >= 4 && n < 8;
  if (short_floats)
    for_each_row<T>(rows, to, [n](const T* from, float* row) FISHERPRUNE_TARGET {
      copy_ends<4>(reinterpret_cast<const float*>(from), n, row);
    });
  else if (step == 1)
    for_each_row<T>(rows, to, [n](const T* from, float* row) FISHERPRUNE_TARGET {
      copy_row(from, n, row);
    });
  else if (step == 2)
    for_each_row<T>(rows, to, [n](const T* from, float* row) FISHERPRUNE_TARGET {
      copy_even(from, n, row);
    });
  else
    for_each_row<T>(rows, to, [n, step](const T* from, float* row) FISHERPRUNE_TARGET {
      for (int64_t j = 0; j < n; ++j) row[j] = to_float(from[j * step]);
    });
}

inline void copy_rows(const Rows& from, const Place& to) {
  if (from.dtype == Dtype::float32)
    copy_rows_of<float>(from, to);
  else if (from.dtype == Dtype::float16)
    copy_rows_of<Float16>(from, to);
  else
    copy_rows_of<BFloat16>(from, to);
}

// Some positions of a row, at most lanes, of lanes channels.
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void transpose_piece(const float* from,
                                                           int64_t step, int64_t ahead,
                                                           int64_t count, float* to,
                                                           int64_t stride) {
  Vec x[kLanes];
  if (count >= kLanes) {
    FISHERPRUNE_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      __builtin_prefetch(from + ahead + i * step);
      x[i] = load(from + i * step);
    }
  } else {
    for (int i = 0; i < kLanes; ++i) x[i] = i < count ? load(from + i * step) : Vec{};
  }
  transpose_square(x);
  FISHERPRUNE_UNROLL
  for (int i = 0; i < kLanes; ++i) store(to + i * stride, x[i]);
}

FISHERPRUNE_TARGET inline void transpose_rows(const Rows& rows, const Place& to) {
  const float* const first = static_cast<const float*>(rows.first);
  for (int64_t c = 0; c < rows.channels; c += kLanes)
    for (int64_t i = 0; i < rows.rows; ++i)
      for (int64_t j = 0; j < rows.cols; j += kLanes)
        transpose_piece(first + c + i * rows.row_stride + j * rows.step, rows.step,
                        rows.row_stride, rows.cols - j,
                        to.first + c * to.channel_stride + i * to.pitch + j,
                        to.channel_stride);
}

constexpr Kernels kTable = {
    kLanes,
#if FISHERPRUNE_WIDE
    {0, 9, 9, 0, 6},
#else
    {0, 9, 6, 0, 3},
#endif
    {{},
     {nullptr, multiply<1, 1>, multiply<2, 1>, multiply<3, 1>, multiply<4, 1>,
      multiply<5, 1>, multiply<6, 1>, multiply<7, 1>, multiply<8, 1>, multiply<9, 1>},
     {nullptr, multiply<1, 2>, multiply<2, 2>, multiply<3, 2>, multiply<4, 2>,
      multiply<5, 2>, multiply<6, 2>,
#if FISHERPRUNE_WIDE
      multiply<7, 2>, multiply<8, 2>, multiply<9, 2>
#endif
     },
     {},
     {nullptr, multiply<1, 4>, multiply<2, 4>, multiply<3, 4>,
#if FISHERPRUNE_WIDE
      multiply<4, 4>, multiply<5, 4>, multiply<6, 4>
#endif
     }},
    copy_rows,
    transpose_rows,
    add_moments,
};
