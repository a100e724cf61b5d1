// The kernels of max_pool2d in one set of vector instructions; no guard, because
// kernels.cpp includes it once for each, with the macros of vector_body.h.
//
// Each lane is a sample.

#include "common/cpu/vector_body.h"
//
#include "common/cpu/entries_body.h"

typedef uint8_t Bytes __attribute__((vector_size(FISHERPRUNE_LANES)));
typedef Bytes BytesInMemory __attribute__((aligned(1), may_alias));

// The first n bytes, zero in the lanes behind them.
FISHERPRUNE_TARGET FISHERPRUNE_INLINE Words load_bytes(const uint8_t* from, int64_t n) {
  uint8_t some[kLanes] = {};
  if (n < kLanes)
    for (int64_t i = 0; i < n; ++i) some[i] = from[i];
  const uint8_t* const all = n < kLanes ? some : from;
  return __builtin_convertvector(*reinterpret_cast<const BytesInMemory*>(all), Words);
}

FISHERPRUNE_TARGET FISHERPRUNE_INLINE void store_bytes(uint8_t* to, Words value,
                                                       int64_t n) {
  uint8_t some[kLanes];
  uint8_t* const all = n < kLanes ? some : to;
  *reinterpret_cast<BytesInMemory*>(all) = __builtin_convertvector(value, Bytes);
  if (n < kLanes)
    for (int64_t i = 0; i < n; ++i) to[i] = some[i];
}

template <class T>
FISHERPRUNE_TARGET void forward(const Window& w) {
  const T* const input = static_cast<const T*>(w.input);
  for (int64_t i = 0; i < w.samples; i += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, w.samples - i);
    Vec best = all_lanes(-std::numeric_limits<float>::infinity());
    Words index = Words{} + static_cast<uint32_t>(w.first);
    for (int64_t y = 0; y < w.rows; ++y) {
      const T* from = input + y * w.row_step + i;
      for (int64_t x = 0; x < w.columns; ++x, from += w.samples) {
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
}

template <class T>
FISHERPRUNE_TARGET void backward(const Holders& h) {
  for (int64_t i = 0; i < h.samples; i += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, h.samples - i);
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
}

constexpr Kernels kTable = {{forward<float>, forward<BFloat16>},
                            {backward<float>, backward<BFloat16>}};
