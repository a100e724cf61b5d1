// The kernels of max_pool2d in one set of vector instructions; no guard, because
// kernels.cpp includes it once for each, with the macros of vector_body.h.
//
// Each lane is a sample, or a channel of one sample.

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

// Lanes i to i + n.
template <class T>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void forward(const Window& w, int64_t i,
                                                   int64_t n) {
  const T* const input = static_cast<const T*>(w.input) + i;
  Vec best = all_lanes(-std::numeric_limits<float>::infinity());
  Words index = Words{} + static_cast<uint32_t>(w.first);
  for (int64_t y = 0; y < w.rows; ++y) {
    const T* from = input + y * w.row_step;
    for (int64_t x = 0; x < w.columns; ++x, from += w.lanes) {
      const Vec value = load_some(from, n);
      const Words own = Words{} + static_cast<uint32_t>(w.first + y * w.kernel_w + x);
      const auto better = (value > best) | (value != value);
      best = better ? value : best;
      index = better ? own : index;
    }
  }
  store_some(static_cast<T*>(w.output) + i, best, n);
  store_bytes(w.index + i, index, n);
}

template <class T>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void backward(const Holders& h, int64_t i,
                                                    int64_t n) {
  Vec sum{};
  for (int64_t p = 0; p < h.rows; ++p) {
    for (int64_t q = 0; q < h.columns; ++q) {
      const int64_t at = p * h.row_step + q * h.lanes + i;
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
  if (i < w.lanes) forward<T>(w, i, w.lanes - i);
}

template <class T>
FISHERPRUNE_TARGET void backward(const Holders& h) {
  int64_t i = 0;
  for (; i + kLanes <= h.lanes; i += kLanes) backward<T>(h, i, kLanes);
  if (i < h.lanes) backward<T>(h, i, h.lanes - i);
}

template <class T>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE Vec load_entries(const T* from, int64_t n) {
  if constexpr (std::is_same_v<T, uint8_t>)
    return reinterpret_cast<Vec>(load_bytes(from, n));
  else
    return load_some(from, n);
}

template <class T>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void store_entries(T* to, Vec value, int64_t n) {
  if constexpr (std::is_same_v<T, uint8_t>)
    store_bytes(to, reinterpret_cast<Words>(value), n);
  else
    store_some(to, value, n);
}

// The square from row i and column j, of which there may be less than all.
template <class T>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void transpose(const Matrix& m, int64_t i,
                                                     int64_t j, int64_t rows,
                                                     int64_t columns) {
  const T* const from = static_cast<const T*>(m.from) + i * m.from_stride + j;
  T* const to = static_cast<T*>(m.to) + j * m.to_stride + i;
  Vec square[kLanes] = {};
  FISHERPRUNE_UNROLL
  for (int k = 0; k < kLanes; ++k)
    if (k < rows) square[k] = load_entries(from + k * m.from_stride, columns);
  transpose_square(square);
  FISHERPRUNE_UNROLL
  for (int k = 0; k < kLanes; ++k)
    if (k < columns) store_entries(to + k * m.to_stride, square[k], rows);
}

template <class T>
FISHERPRUNE_TARGET void transpose(const Matrix& m) {
  for (int64_t i = 0; i < m.rows; i += kLanes) {
    for (int64_t j = 0; j < m.columns; j += kLanes) {
      const int64_t rows = m.rows - i, columns = m.columns - j;
      if (rows >= kLanes && columns >= kLanes)
        transpose<T>(m, i, j, kLanes, kLanes);
      else
        transpose<T>(m, i, j, rows, columns);
    }
  }
}

constexpr Kernels kTable = {{forward<float>, forward<BFloat16>},
                            {backward<float>, backward<BFloat16>},
                            {transpose<float>, transpose<BFloat16>},
                            transpose<uint8_t>};
