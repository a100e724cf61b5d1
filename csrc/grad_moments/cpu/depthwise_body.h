// The depthwise way's kernels in one set of vector instructions; no guard, because
// depthwise_kernels.cpp includes it once for each, with the macros of vector_body.h.
//
// Each lane is a channel. The sums of up to kMostTaps taps stay in registers along a
// row: per column a call loads one vector of the gradient, and for each tap one of the
// input, for one multiply-add.

#include "common/cpu/vector_body.h"

FISHERPRUNE_TARGET FISHERPRUNE_INLINE Vec load_lanes(const float* from) {
  return load(from);
}

template <class T>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE Vec load_lanes(const T* from) {
  alignas(64) float values[kLanes];
  for (int i = 0; i < kLanes; ++i) values[i] = to_float(from[i]);
  return load(values);
}

template <class T, int X>
FISHERPRUNE_TARGET void add_taps(const Row& row, int64_t first, float* sums) {
  const T* const a = static_cast<const T*>(row.input) + first * row.tap_step;
  const T* const d = static_cast<const T*>(row.grad);
  const Inside* const inside = row.inside + first;
  Inside all = inside[0], any = inside[0];
  for (int x = 1; x < X; ++x) {
    all = {std::max(all.begin, inside[x].begin), std::min(all.end, inside[x].end)};
    any = {std::min(any.begin, inside[x].begin), std::max(any.end, inside[x].end)};
  }
  Vec acc[X];
  FISHERPRUNE_UNROLL
  for (int x = 0; x < X; ++x) acc[x] = load(sums + x * kLanes);
  for (int64_t q = any.begin; q < any.end; ++q) {
    const T* const at = a + q * row.input_step;
    const Vec y = load_lanes(d + q * row.grad_step);
    if (q >= all.begin && q < all.end) {
      FISHERPRUNE_UNROLL
      for (int x = 0; x < X; ++x) acc[x] += load_lanes(at + x * row.tap_step) * y;
    } else {
      FISHERPRUNE_UNROLL
      for (int x = 0; x < X; ++x)
        if (q >= inside[x].begin && q < inside[x].end)
          acc[x] += load_lanes(at + x * row.tap_step) * y;
    }
  }
  FISHERPRUNE_UNROLL
  for (int x = 0; x < X; ++x) store(sums + x * kLanes, acc[x]);
}

template <class T>
void add_row(const Row& row, float* sums) {
  constexpr void (*some[])(const Row&, int64_t, float*) = {
      nullptr,        add_taps<T, 1>, add_taps<T, 2>, add_taps<T, 3>,
      add_taps<T, 4>, add_taps<T, 5>, add_taps<T, 6>, add_taps<T, 7>};
  for (int64_t x = 0; x < row.taps; x += kMostTaps)
    some[std::min(kMostTaps, row.taps - x)](row, x, sums + x * kLanes);
}

constexpr Kernels kTable = {kLanes,
                            {add_row<float>, add_row<Float16>, add_row<BFloat16>}};
