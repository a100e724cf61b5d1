// The kernels of max_pool2d in one set of vector instructions; no guard, because
// kernels.cpp includes it once for each, with the macros of vector_body.h.
//
// Each lane is a sample, or a position.

#include "common/cpu/vector_body.h"
//
#include "common/cpu/entries_body.h"

typedef uint8_t Bytes __attribute__((vector_size(FISHERPRUNE_LANES)));

// A byte of each lane, and back. Compilers convert 16 of them in one instruction, but 8
// one by one: these are shuffled.
#if FISHERPRUNE_LANES == 8
typedef uint8_t WordBytes __attribute__((vector_size(32)));
typedef uint64_t Copies __attribute__((vector_size(32)));

FISHERPRUNE_TARGET FISHERPRUNE_INLINE Words words_of(Bytes bytes) {
  uint64_t all;
  std::memcpy(&all, &bytes, sizeof all);
  const auto copies = reinterpret_cast<WordBytes>(Copies{all, all, all, all});
  return reinterpret_cast<Words>(__builtin_shufflevector(
      copies, WordBytes{}, 0, 32, 32, 32, 1, 32, 32, 32, 2, 32, 32, 32, 3, 32, 32, 32,
      20, 32, 32, 32, 21, 32, 32, 32, 22, 32, 32, 32, 23, 32, 32, 32));
}

FISHERPRUNE_TARGET FISHERPRUNE_INLINE Bytes bytes_of(Words words) {
  const auto all = reinterpret_cast<WordBytes>(words);
  return __builtin_shufflevector(all, all, 0, 4, 8, 12, 16, 20, 24, 28);
}
#else
FISHERPRUNE_TARGET FISHERPRUNE_INLINE Words words_of(Bytes bytes) {
  return __builtin_convertvector(bytes, Words);
}

FISHERPRUNE_TARGET FISHERPRUNE_INLINE Bytes bytes_of(Words words) {
  return __builtin_convertvector(words, Bytes);
}
#endif

// The first n bytes, zero in the lanes behind them.
FISHERPRUNE_TARGET FISHERPRUNE_INLINE Words load_bytes(const uint8_t* from, int64_t n) {
  Bytes bytes{};
  if (n >= kLanes)
    std::memcpy(&bytes, from, kLanes);
  else
    for (int64_t i = 0; i < n; ++i) bytes[i] = from[i];
  return words_of(bytes);
}

FISHERPRUNE_TARGET FISHERPRUNE_INLINE void store_bytes(uint8_t* to, Words value,
                                                       int64_t n) {
  const Bytes bytes = bytes_of(value);
  if (n >= kLanes)
    std::memcpy(to, &bytes, kLanes);
  else
    for (int64_t i = 0; i < n; ++i) to[i] = bytes[i];
}

// The first n entries, or all lanes that are `step` apart.
template <class T>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE Vec load_apart(const T* from, int64_t step,
                                                     int64_t n) {
  if (step == 1) return load_some(from, n);
  if (step == 2)  // nothing behind the last entry is read
    return every_second(load_all(from), load_all(from + kLanes - 1));
  T some[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) some[i] = from[i * step];
  return load_all(some);
}

// Lanes i to i + n.
template <class T>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void forward(const Window& w, int64_t i,
                                                   int64_t n) {
  const T* const input = static_cast<const T*>(w.input) + i * w.lane_step;
  Vec best = all_lanes(-std::numeric_limits<float>::infinity());
  Words index = Words{} + static_cast<uint32_t>(w.first);
  for (int64_t y = 0; y < w.rows; ++y) {
    const T* from = input + y * w.row_step;
    for (int64_t x = 0; x < w.columns; ++x, from += w.column_step) {
      const Vec value = load_apart(from, w.lane_step, n);
      const Words own = Words{} + static_cast<uint32_t>(w.first + y * w.kernel_w + x);
      const auto better = (value > best) | (value != value);
      best = better ? value : best;
      index = better ? own : index;
    }
  }
  store_some(static_cast<T*>(w.output) + i, best, n);
  store_bytes(w.index + i, index, n);
}

// Lane i alone, without branches: what is larger can't be foreseen.
template <class T>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void forward_lane(const Window& w, int64_t i) {
  const T* const input = static_cast<const T*>(w.input) + i * w.lane_step;
  float best = -std::numeric_limits<float>::infinity();
  uint32_t bits, index = static_cast<uint32_t>(w.first);
  std::memcpy(&bits, &best, sizeof bits);
  for (int64_t y = 0; y < w.rows; ++y) {
    for (int64_t x = 0; x < w.columns; ++x) {
      const float value = to_float(input[y * w.row_step + x * w.column_step]);
      const auto own = static_cast<uint32_t>(w.first + y * w.kernel_w + x);
      const uint32_t better = 0u - ((value > best) | (value != value));
      uint32_t own_bits;
      std::memcpy(&own_bits, &value, sizeof own_bits);
      bits ^= (bits ^ own_bits) & better;
      index ^= (index ^ own) & better;
      std::memcpy(&best, &bits, sizeof best);
    }
  }
  if constexpr (std::is_same_v<T, float>)
    static_cast<T*>(w.output)[i] = best;
  else
    static_cast<T*>(w.output)[i] = to_bfloat16(best);
  w.index[i] = static_cast<uint8_t>(index);
}

template <class T>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void backward(const Holders& h, int64_t i,
                                                    int64_t n) {
  Vec sum{};
  for (int64_t p = 0; p < h.rows; ++p) {
    for (int64_t q = 0; q < h.columns; ++q) {
      const int64_t at = p * h.row_step + q * h.samples + i;
      const Words own =
          Words{} + static_cast<uint32_t>(h.first - p * h.down - q * h.along);
      const Vec grad = load_some(static_cast<const T*>(h.grad) + at, n);
      sum += load_bytes(h.index + at, n) == own ? grad : Vec{};
    }
  }
  store_some(static_cast<T*>(h.grad_input) + i, sum, n);
}

template <class T>
FISHERPRUNE_TARGET void forward(const Window& w) {
  int64_t i = 0;
  for (; i + kLanes <= w.lanes; i += kLanes) forward<T>(w, i, kLanes);
  if (i < w.lanes && w.lane_step == 1) return forward<T>(w, i, w.lanes - i);
  for (; i < w.lanes; ++i) forward_lane<T>(w, i);
}

template <class T>
FISHERPRUNE_TARGET void backward(const Holders& h) {
  int64_t i = 0;
  for (; i + kLanes <= h.samples; i += kLanes) backward<T>(h, i, kLanes);
  if (i < h.samples) backward<T>(h, i, h.samples - i);
}

constexpr Kernels kTable = {{forward<float>, forward<BFloat16>},
                            {backward<float>, backward<BFloat16>}};
