// The kernels of sparse convolutions in one set of vector instructions; no guard,
// because kernels.cpp includes it once for each, with the macros of vector_body.h.
//
// A call keeps some chunks of one output channel in registers while it goes over the
// channel's taps: each is one number in all lanes, and as many multiply-adds with
// vectors from the tile, in the second-level cache, as there are vectors of chunks.

#include "common/cpu/vector_body.h"
//
#include "common/cpu/past_caches_body.h"

constexpr int kParts = kChunk / kLanes;  // vectors of a chunk
// Twelve sums hide the time that a multiply-add takes, and leave registers.
constexpr int kMost = FISHERPRUNE_WIDE ? 12 : 12 / kParts;

// Vector i of some rows of T chunks.
template <int T, class Float>
FISHERPRUNE_INLINE Float* in_image(Float* first, const Rows& rows, int i) {
  return first + i / (T * kParts) * rows.stride +
         i % (T * kParts) / kParts * rows.step + i % kParts * kLanes;
}

template <int T>
FISHERPRUNE_INLINE const float* in_tile(const float* first, const Rows& rows, int i) {
  return first + i / (T * kParts) * rows.tile_stride + i % (T * kParts) * kLanes;
}

template <int R, int T>
FISHERPRUNE_TARGET void correlate(const Taps& taps, const Rows& rows, float start,
                                  const float* before, bool relu) {
  constexpr int n = R * T * kParts;
  const Tap* const end = taps.first + taps.count;
  for (int64_t r = 0; r < rows.count; r += R) {
    const float* const tile = rows.tile + r * rows.tile_stride;
    float* const image = rows.image + r * rows.stride;
    Vec acc[n];
    FISHERPRUNE_UNROLL
    for (int i = 0; i < n; ++i) acc[i] = start - Vec{};
    if (before) {
      const float* const first = before + r * rows.stride;
      FISHERPRUNE_UNROLL
      for (int i = 0; i < n; ++i) acc[i] += load(in_image<T>(first, rows, i));
    }
    for (const Tap* tap = taps.first; tap != end; ++tap) {
      const float* const x = tile + tap->offset;
      const Vec weight = tap->weight - Vec{};
      FISHERPRUNE_UNROLL
      for (int i = 0; i < n; ++i) acc[i] += weight * load(in_tile<T>(x, rows, i));
    }
    if (relu) {
      FISHERPRUNE_UNROLL
      for (int i = 0; i < n; ++i) acc[i] = acc[i] < 0 ? Vec{} : acc[i];
    }
    if (rows.past_caches) {
      FISHERPRUNE_UNROLL
      for (int i = 0; i < n; ++i) store_past(in_image<T>(image, rows, i), acc[i]);
    } else {
      FISHERPRUNE_UNROLL
      for (int i = 0; i < n; ++i) store(in_image<T>(image, rows, i), acc[i]);
    }
  }
}

template <int R, int T>
FISHERPRUNE_TARGET void multiply(const Taps& taps, const Rows& rows, float* lanes,
                                 bool add) {
  constexpr int n = R * T * kParts;
  for (int64_t r = 0; r < rows.count; r += R) {
    const float* const tile = rows.tile + r * rows.tile_stride;
    float* const image = rows.image + r * rows.stride;
    Vec grad[n];
    FISHERPRUNE_UNROLL
    for (int i = 0; i < n; ++i) grad[i] = load(in_image<T>(image, rows, i));
    const bool join = add || r > 0;
    for (int64_t t = 0; t < taps.count; ++t) {
      const float* const x = tile + taps.first[t].offset;
      Vec even = join ? load(lanes + t * kLanes) : Vec{}, odd{};
      FISHERPRUNE_UNROLL
      for (int i = 0; i < n; ++i)
        (i % 2 ? odd : even) += grad[i] * load(in_tile<T>(x, rows, i));
      store(lanes + t * kLanes, even + odd);
    }
  }
}

FISHERPRUNE_TARGET inline void copy(const float* from, int64_t step, int64_t count,
                                    float* to) {
  for (int64_t i = 0; i < count; ++i) {
    FISHERPRUNE_UNROLL
    for (int p = 0; p < kParts; ++p)
      store(to + i * kChunk + p * kLanes, load(from + i * step + p * kLanes));
  }
}

FISHERPRUNE_TARGET inline void transpose(const float* from, int64_t sample_stride,
                                         int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    FISHERPRUNE_UNROLL
    for (int p = 0; p < kParts; ++p) {
      Vec square[kLanes];
      FISHERPRUNE_UNROLL
      for (int n = 0; n < kLanes; ++n)
        square[n] = load(from + i + (p * kLanes + n) * sample_stride);
      transpose_square(square);
      FISHERPRUNE_UNROLL
      for (int n = 0; n < kLanes; ++n)
        store(to + (i + n) * kChunk + p * kLanes, square[n]);
    }
  }
  for (; i < count; ++i)
    for (int n = 0; n < kChunk; ++n) to[i * kChunk + n] = from[i + n * sample_stride];
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

template <int R, int T>
constexpr Correlate correlate_of() {
  if constexpr (R * T <= kMost) return correlate<R, T>;
  return nullptr;
}

template <int R, int T>
constexpr Multiply multiply_of() {
  if constexpr (R * T <= kMost) return multiply<R, T>;
  return nullptr;
}

template <int... T>
constexpr Kernels table(std::integer_sequence<int, T...>) {
  return {kLanes,
          kMost,
          {{},
           {nullptr, correlate_of<1, T + 1>()...},
           {nullptr, correlate_of<2, T + 1>()...},
           {nullptr, correlate_of<3, T + 1>()...}},
          {{},
           {nullptr, multiply_of<1, T + 1>()...},
           {nullptr, multiply_of<2, T + 1>()...},
           {nullptr, multiply_of<3, T + 1>()...}},
          drain,
          copy,
          transpose,
          add_lanes};
}

constexpr Kernels kTable = table(std::make_integer_sequence<int, kMostChunks>());
