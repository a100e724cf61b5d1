// The kernels of sparse convolutions in one set of vector instructions; no guard,
// because kernels.cpp includes it once for each, with the macros of vector_body.h.
//
// A call keeps some chunks of one output channel in registers while it goes over the
// channel's taps: each is one number in all lanes, and as many multiply-adds with
// vectors from the tile, in the second-level cache, as there are vectors of chunks.

#include "common/cpu/vector_body.h"

constexpr int kParts = kChunk / kLanes;  // vectors of a chunk
// Twelve sums hide the time that a multiply-add takes, and leave registers.
constexpr int kMost = FISHERPRUNE_WIDE ? 12 : 12 / kParts;

template <int T>
FISHERPRUNE_TARGET void correlate(const Taps& taps, const Rows& rows, float start,
                                  bool add, bool relu) {
  for (int64_t r = 0; r < rows.count; ++r) {
    const float* const tile = rows.tile + r * rows.tile_stride;
    float* const image = rows.image + r * rows.stride;
    Vec acc[T * kParts];
    FISHERPRUNE_UNROLL
    for (int i = 0; i < T * kParts; ++i)
      acc[i] = add ? load(image + i / kParts * rows.step + i % kParts * kLanes)
                   : start - Vec{};
    for (int64_t t = 0; t < taps.count; ++t) {
      const float* const x = tile + taps.first[t].offset;
      const Vec weight = taps.first[t].weight - Vec{};
      FISHERPRUNE_UNROLL
      for (int i = 0; i < T * kParts; ++i) acc[i] += weight * load(x + i * kLanes);
    }
    if (relu) {
      FISHERPRUNE_UNROLL
      for (int i = 0; i < T * kParts; ++i) acc[i] = acc[i] < 0 ? Vec{} : acc[i];
    }
    FISHERPRUNE_UNROLL
    for (int i = 0; i < T * kParts; ++i)
      store(image + i / kParts * rows.step + i % kParts * kLanes, acc[i]);
  }
}

template <int T>
FISHERPRUNE_TARGET void multiply(const Taps& taps, const Rows& rows, float* lanes,
                                 bool add) {
  for (int64_t r = 0; r < rows.count; ++r) {
    const float* const tile = rows.tile + r * rows.tile_stride;
    const float* const image = rows.image + r * rows.stride;
    Vec grad[T * kParts];
    FISHERPRUNE_UNROLL
    for (int i = 0; i < T * kParts; ++i)
      grad[i] = load(image + i / kParts * rows.step + i % kParts * kLanes);
    const bool join = add || r > 0;
    for (int64_t t = 0; t < taps.count; ++t) {
      const float* const x = tile + taps.first[t].offset;
      Vec even = join ? load(lanes + t * kLanes) : Vec{}, odd{};
      FISHERPRUNE_UNROLL
      for (int i = 0; i < T * kParts; ++i)
        (i % 2 ? odd : even) += grad[i] * load(x + i * kLanes);
      store(lanes + t * kLanes, even + odd);
    }
  }
}

FISHERPRUNE_TARGET inline void add_lanes(const float* lanes, int64_t count, float* sums,
                                         bool add) {
  for (int64_t t = 0; t < count; t += kLanes) {
    Vec square[kLanes];
    FISHERPRUNE_UNROLL
    for (int i = 0; i < kLanes; ++i) square[i] = load(lanes + (t + i) * kLanes);
    transpose_square(square);
    FISHERPRUNE_UNROLL
    for (int width = kLanes / 2; width >= 1; width /= 2) {
      FISHERPRUNE_UNROLL
      for (int i = 0; i < width; ++i) square[i] += square[i + width];
    }
    float all[kLanes];
    store(all, square[0]);
    for (int i = 0; i < kLanes && t + i < count; ++i)
      sums[t + i] = add ? sums[t + i] + all[i] : all[i];
  }
}

template <int... T>
constexpr Kernels table(std::integer_sequence<int, T...>) {
  return {kLanes,
          kMost,
          {nullptr, correlate<T + 1>...},
          {nullptr, multiply<T + 1>...},
          add_lanes};
}

constexpr Kernels kTable = table(std::make_integer_sequence<int, kMost>());
