// The kernels of sparse convolutions in one set of vector instructions; no guard,
// because kernels.cpp includes it once for each, with the macros of vector_body.h.
//
// A call keeps some chunks of one output channel in registers while it goes over the
// channel's taps: each is one number in all lanes, and as many multiply-adds with
// vectors from the tile, in the second-level cache, as there are vectors of chunks. Of
// pairs each vector of words is two of numbers, made by a shift and by a mask.

#include "common/cpu/vector_body.h"
//
#include "common/cpu/entries_body.h"
#include "common/cpu/past_caches_body.h"
//
#include "common/cpu/pairs_body.h"

constexpr int kParts = kChunk / kLanes;  // vectors of a chunk
// Twelve sums hide the time that a multiply-add takes, and leave registers.
constexpr int kMost = FISHERPRUNE_WIDE ? 12 : 12 / kParts;

// What the words of tiles and images are: kNumbers numbers each.
struct Floats {
  using Entry = float;
  static constexpr int kNumbers = 1;

  FISHERPRUNE_TARGET FISHERPRUNE_INLINE static void load_to(Vec* to,
                                                            const float* from) {
    to[0] = load(from);
  }
  FISHERPRUNE_TARGET FISHERPRUNE_INLINE static Words words(const Vec* numbers) {
    return reinterpret_cast<Words>(numbers[0]);
  }
};

struct Pairs {
  using Entry = BFloat16;
  static constexpr int kNumbers = 2;

  FISHERPRUNE_TARGET FISHERPRUNE_INLINE static void load_to(Vec* to,
                                                            const BFloat16* from) {
    const Words pairs = load_words(from);
    to[0] = first_of(pairs), to[1] = second_of(pairs);
  }
  FISHERPRUNE_TARGET FISHERPRUNE_INLINE static Words words(const Vec* numbers) {
    return paired(numbers[0], numbers[1]);
  }
};

// Vector i of some rows of T chunks.
template <class Word, int T, class Entry>
FISHERPRUNE_INLINE Entry* in_image(Entry* first, const Rows& rows, int i) {
  return first + i / (T * kParts) * rows.stride +
         i % (T * kParts) / kParts * rows.step + i % kParts * kLanes * Word::kNumbers;
}

template <class Word, int T>
FISHERPRUNE_INLINE const typename Word::Entry* in_tile(const float* first,
                                                       const Rows& rows, int i) {
  return reinterpret_cast<const typename Word::Entry*>(
      first + i / (T * kParts) * rows.tile_stride + i % (T * kParts) * kLanes);
}

template <class Word, int R, int T>
FISHERPRUNE_TARGET void correlate(const Taps& taps, const Rows& rows, float start,
                                  const void* before, bool relu) {
  using Entry = typename Word::Entry;
  constexpr int n = R * T * kParts, of = Word::kNumbers;
  const Tap* const end = taps.first + taps.count;
  for (int64_t r = 0; r < rows.count; r += R) {
    const float* const tile = rows.tile + r * rows.tile_stride;
    Entry* const image = static_cast<Entry*>(rows.image) + r * rows.stride;
    Vec acc[n * of];
    FISHERPRUNE_UNROLL
    for (int i = 0; i < n * of; ++i) acc[i] = start - Vec{};
    if (before) {
      const Entry* const first = static_cast<const Entry*>(before) + r * rows.stride;
      FISHERPRUNE_UNROLL
      for (int i = 0; i < n; ++i) {
        Vec x[of];
        Word::load_to(x, in_image<Word, T>(first, rows, i));
        FISHERPRUNE_UNROLL
        for (int k = 0; k < of; ++k) acc[i * of + k] += x[k];
      }
    }
    for (const Tap* tap = taps.first; tap != end; ++tap) {
      const float* const first = tile + tap->offset;
      const Vec weight = tap->weight - Vec{};
      FISHERPRUNE_UNROLL
      for (int i = 0; i < n; ++i) {
        Vec x[of];
        Word::load_to(x, in_tile<Word, T>(first, rows, i));
        FISHERPRUNE_UNROLL
        for (int k = 0; k < of; ++k) acc[i * of + k] += weight * x[k];
      }
    }
    if (relu) {
      FISHERPRUNE_UNROLL
      for (int i = 0; i < n * of; ++i) acc[i] = acc[i] < 0 ? Vec{} : acc[i];
    }
    if (rows.past_caches) {
      FISHERPRUNE_UNROLL
      for (int i = 0; i < n; ++i)
        store_past(reinterpret_cast<float*>(in_image<Word, T>(image, rows, i)),
                   reinterpret_cast<Vec>(Word::words(acc + i * of)));
    } else {
      FISHERPRUNE_UNROLL
      for (int i = 0; i < n; ++i)
        store_words(in_image<Word, T>(image, rows, i), Word::words(acc + i * of));
    }
  }
}

template <int N>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void add_kept(const Kept& kept, int64_t place,
                                                    const float* tile, Vec (&acc)[N]) {
  const float* const from = tile + kept.places[kept.columns[place]];
  const Vec weight = all_lanes(kept.values[place]);
  FISHERPRUNE_UNROLL
  for (int i = 0; i < N; ++i) acc[i] += weight * load(from + i * kLanes);
}

// Where few vectors would wait for themselves, some weights at a time have sums of
// their own.
template <int T>
FISHERPRUNE_TARGET void sum(const Kept& kept, const float* tile, float start,
                            const float* before, bool relu, float* to) {
  constexpr int n = T * kParts, weights = n > 6 ? 1 : n > 3 ? 2 : 4;
  Vec acc[weights][n] = {};
  FISHERPRUNE_UNROLL
  for (int i = 0; i < n; ++i) {
    acc[0][i] = all_lanes(start);
    if (before) acc[0][i] += load(before + i * kLanes);
  }
  int64_t first = 0;
  for (; first + weights <= kept.count; first += weights) {
    FISHERPRUNE_UNROLL
    for (int k = 0; k < weights; ++k) add_kept(kept, first + k, tile, acc[k]);
  }
  for (; first < kept.count; ++first) add_kept(kept, first, tile, acc[0]);
  FISHERPRUNE_UNROLL
  for (int i = 0; i < n; ++i) {
    FISHERPRUNE_UNROLL
    for (int k = 1; k < weights; ++k) acc[0][i] += acc[k][i];
    const Vec all = acc[0][i];
    store(to + i * kLanes, relu ? (all < 0 ? Vec{} : all) : all);
  }
}

template <class Word, int R, int T>
FISHERPRUNE_TARGET void multiply(const Taps& taps, const Rows& rows, float* lanes,
                                 bool add) {
  constexpr int n = R * T * kParts, of = Word::kNumbers;
  for (int64_t r = 0; r < rows.count; r += R) {
    const float* const tile = rows.tile + r * rows.tile_stride;
    const auto* const image =
        static_cast<const typename Word::Entry*>(rows.image) + r * rows.stride;
    Vec grad[n * of];
    FISHERPRUNE_UNROLL
    for (int i = 0; i < n; ++i)
      Word::load_to(grad + i * of, in_image<Word, T>(image, rows, i));
    if (r + R < rows.count) {  // fetch what comes next
      FISHERPRUNE_UNROLL
      for (int i = 0; i < n; i += kParts)
        __builtin_prefetch(in_image<Word, T>(image + R * rows.stride, rows, i));
    }
    const bool join = add || r > 0;
    for (int64_t t = 0; t < taps.count; ++t) {
      const float* const first = tile + taps.first[t].offset;
      Vec even = join ? load(lanes + t * kLanes) : Vec{}, odd{};
      FISHERPRUNE_UNROLL
      for (int i = 0; i < n; ++i) {
        Vec x[of];
        Word::load_to(x, in_tile<Word, T>(first, rows, i));
        FISHERPRUNE_UNROLL
        for (int k = 0; k < of; ++k)
          ((i * of + k) % 2 ? odd : even) += grad[i * of + k] * x[k];
      }
      store(lanes + t * kLanes, even + odd);
    }
  }
}

FISHERPRUNE_TARGET inline void copy(const void* from, int64_t step, int64_t count,
                                    float* to) {
  const char* const bytes = static_cast<const char*>(from);
  for (int64_t i = 0; i < count; ++i) {
    FISHERPRUNE_UNROLL
    for (int p = 0; p < kParts; ++p)
      store_words(to + i * kChunk + p * kLanes,
                  load_words(bytes + i * step + p * 4 * kLanes));
  }
}

// Pieces of so many floats, of which the last one may lie over the one before it.
template <int kFloats = kLanes>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void copy_row(const float* from, int64_t length,
                                                    float* to) {
  if constexpr (kFloats > 1)
    if (length < kFloats) return copy_row<kFloats / 2>(from, length, to);
  constexpr size_t bytes = kFloats * sizeof(float);
  const int64_t last = length - kFloats;
  for (int64_t i = 0; i < last; i += kFloats) std::memcpy(to + i, from + i, bytes);
  if (last >= 0) std::memcpy(to + last, from + last, bytes);
}

FISHERPRUNE_TARGET inline void copy_rows(const float* from, int64_t from_stride,
                                         int64_t rows, int64_t length, float* to,
                                         int64_t to_stride) {
  for (int64_t r = 0; r < rows; ++r)
    copy_row(from + r * from_stride, length, to + r * to_stride);
}

template <class Word>
FISHERPRUNE_TARGET void transpose(const void* source, int64_t sample_stride,
                                  int64_t count, float* to) {
  using Entry = typename Word::Entry;
  constexpr int samples = kChunk * Word::kNumbers;
  const Entry* const from = static_cast<const Entry*>(source);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    FISHERPRUNE_UNROLL
    for (int p = 0; p < kParts; ++p) {
      Vec square[kLanes];
      const int64_t first = p * kLanes * Word::kNumbers;
      load_square(from + i + first * sample_stride, sample_stride, square);
      transpose_square(square);
      FISHERPRUNE_UNROLL
      for (int n = 0; n < kLanes; ++n)
        store(to + (i + n) * kChunk + p * kLanes, square[n]);
    }
  }
  Entry* const entries = reinterpret_cast<Entry*>(to);
  for (; i < count; ++i)
    for (int n = 0; n < samples; ++n)
      entries[i * samples + n] = from[i + n * sample_stride];
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

template <class Word, int R, int T>
constexpr Correlate correlate_of() {
  if constexpr (R * T * Word::kNumbers <= kMost) return correlate<Word, R, T>;
  return nullptr;
}

template <class Word, int R, int T>
constexpr Multiply multiply_of() {
  if constexpr (R * T * Word::kNumbers <= kMost) return multiply<Word, R, T>;
  return nullptr;
}

template <class Word, int... T>
constexpr Form form(std::integer_sequence<int, T...>) {
  return {kMost / Word::kNumbers,
          {{},
           {nullptr, correlate_of<Word, 1, T + 1>()...},
           {nullptr, correlate_of<Word, 2, T + 1>()...},
           {nullptr, correlate_of<Word, 3, T + 1>()...}},
          {{},
           {nullptr, multiply_of<Word, 1, T + 1>()...},
           {nullptr, multiply_of<Word, 2, T + 1>()...},
           {nullptr, multiply_of<Word, 3, T + 1>()...}},
          transpose<Word>};
}

template <int T>
constexpr Sum sum_of() {
  if constexpr (T * Floats::kNumbers <= kMost) return sum<T>;
  return nullptr;
}

template <int... T>
constexpr Kernels table(std::integer_sequence<int, T...> chunks) {
  return {kLanes,
          form<Floats>(chunks),
          form<Pairs>(chunks),
          {nullptr, sum_of<T + 1>()...},
          drain,
          copy,
          copy_rows,
          add_lanes};
}

constexpr Kernels kTable = table(std::make_integer_sequence<int, kMostChunks>());
