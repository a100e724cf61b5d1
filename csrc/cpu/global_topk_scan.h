// The inner loops of the CPU's global_topk: plain loops over one block in the L1 cache,
// compiled for several instruction sets, chosen at run time.
#pragma once

#include <cstdint>

#include "../global_topk.h"
#include "capability.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fisherprune {
namespace topk {

constexpr int64_t kBlock = 1024;  // keys that stay in the L1 cache between the loops

// Keys from low to high, both included.
struct Bracket {
  uint32_t low, high;
  bool single() const { return low == high; }
};

struct Counts {
  int64_t above = 0, inside = 0;  // of a bracket
};

// Of one block. Small enough to be returned in one register: through memory they would
// wait for the mask's bytes, which are on their way there before them.
struct BlockCounts {
  int32_t above, inside;
};

struct BlockLoops {
  // Writes the keys of `size` scores, returns how many scores are NaN or infinite.
  int64_t (*keys)(const float* scores, int64_t size, uint32_t* key);
  // mask = above the bracket, as bytes 0 and 1; inside = in the bracket, as bits, of
  // which whole words are written.
  BlockCounts (*split)(const uint32_t* key, int64_t size, Bracket bracket,
                       uint8_t* mask, uint64_t* inside);
  // Waits until the masks that split() wrote past the caches are there for all threads.
  void (*publish)();
  // mask = at least `least`.
  void (*at_least)(const uint32_t* key, int64_t size, uint32_t least, uint8_t* mask);
};

#define FISHERPRUNE_INLINE inline __attribute__((always_inline))

FISHERPRUNE_INLINE int64_t keys_loop(const float* scores, int64_t size, uint32_t* key) {
  int32_t nonfinite = 0;
  for (int64_t j = 0; j < size; ++j) {
    uint32_t bits;
    memcpy(&bits, scores + j, sizeof bits);
    nonfinite += (bits & 0x7fffffffu) >= 0x7f800000u;
    bits = bits == 0x80000000u ? 0 : bits;  // as key_of, in a form that vectorizes
    key[j] = bits ^ (bits & 0x80000000u ? 0xffffffffu : 0x80000000u);
  }
  return nonfinite;
}

// Eight bytes 0 or 1 as the bits of one, the first byte lowest.
FISHERPRUNE_INLINE uint64_t pack_bytes(const uint8_t* bytes) {
  uint64_t x = 0;
  for (int i = 0; i < 8; ++i) x |= uint64_t{bytes[i]} << i;
  return x;
}

FISHERPRUNE_INLINE BlockCounts split_loop(const uint32_t* key, int64_t size,
                                          Bracket bracket, uint8_t* mask,
                                          uint64_t* inside) {
  const uint32_t width = bracket.high - bracket.low;
  uint8_t bytes[kBlock + 63];
  int32_t above = 0, within = 0;
  for (int64_t j = 0; j < size; ++j) {
    const bool is_above = key[j] > bracket.high;
    const bool is_inside = key[j] - bracket.low <= width;
    mask[j] = is_above, bytes[j] = is_inside;
    above += is_above, within += is_inside;
  }
  memset(bytes + size, 0, 63);
  for (int64_t j = 0; j < size; j += 64) {
    uint64_t word = 0;
    for (int i = 0; i < 8; ++i) word |= pack_bytes(bytes + j + 8 * i) << (8 * i);
    inside[j / 64] = word;
  }
  return {above, within};
}

FISHERPRUNE_INLINE void at_least_loop(const uint32_t* key, int64_t size, uint32_t least,
                                      uint8_t* mask) {
  for (int64_t j = 0; j < size; ++j) mask[j] = key[j] >= least;
}

inline void publish_nothing() {}

// The loops inlined into functions of their own, compiled for the TARGET.
#define FISHERPRUNE_BLOCK_LOOPS(NAME, TARGET)                                          \
  TARGET inline int64_t keys_##NAME(const float* scores, int64_t size,                 \
                                    uint32_t* key) {                                   \
    return keys_loop(scores, size, key);                                               \
  }                                                                                    \
  TARGET inline BlockCounts split_##NAME(const uint32_t* key, int64_t size, Bracket b, \
                                         uint8_t* mask, uint64_t* inside) {            \
    return split_loop(key, size, b, mask, inside);                                     \
  }                                                                                    \
  TARGET inline void at_least_##NAME(const uint32_t* key, int64_t size,                \
                                     uint32_t least, uint8_t* mask) {                  \
    at_least_loop(key, size, least, mask);                                             \
  }                                                                                    \
  inline constexpr BlockLoops loops_##NAME{keys_##NAME, split_##NAME, publish_nothing, \
                                           at_least_##NAME};

FISHERPRUNE_BLOCK_LOOPS(portable, )
#if defined(__x86_64__)
FISHERPRUNE_BLOCK_LOOPS(avx2, __attribute__((target("avx2"))))
FISHERPRUNE_BLOCK_LOOPS(avx512_plain,
                        __attribute__((target("avx512f,avx512bw,avx512vl"))))

// A whole line of a mask. Written past the caches, where it may be: nothing reads it
// soon, and to fetch the line first would double the traffic.
__attribute__((target("avx512f,avx512bw"))) inline void write_line(uint8_t* mask,
                                                                   __m512i bytes) {
  if (reinterpret_cast<uintptr_t>(mask) % 64 == 0)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(mask), bytes);
  else
    _mm512_storeu_si512(mask, bytes);
}

inline void publish_stream() { _mm_sfence(); }

// 64 keys at a time, whose comparisons are the bits of one word; by hand, because
// compilers narrow the comparisons to bytes in many steps.
__attribute__((target("avx512f,avx512bw,avx512vl,popcnt"))) inline BlockCounts
split_avx512(const uint32_t* key, int64_t size, Bracket bracket, uint8_t* mask,
             uint64_t* inside) {
  const __m512i low = _mm512_set1_epi32(static_cast<int>(bracket.low));
  const __m512i high = _mm512_set1_epi32(static_cast<int>(bracket.high));
  int32_t above = 0, within = 0;
  int64_t j = 0;
  for (; j + 64 <= size; j += 64) {
    uint64_t over = 0, in = 0;  // in: first those from low on
    for (int part = 0; part < 4; ++part) {
      const __m512i x = _mm512_loadu_si512(key + j + 16 * part);
      over |= uint64_t{_mm512_cmpgt_epu32_mask(x, high)} << (16 * part);
      in |= uint64_t{_mm512_cmpge_epu32_mask(x, low)} << (16 * part);
    }
    in &= ~over;
    write_line(mask + j, _mm512_maskz_set1_epi8(over, 1));
    inside[j / 64] = in;
    above += __builtin_popcountll(over), within += __builtin_popcountll(in);
  }
  if (j == size) return {above, within};
  const BlockCounts rest =
      split_avx512_plain(key + j, size - j, bracket, mask + j, inside + j / 64);
  return {above + rest.above, within + rest.inside};
}

inline constexpr BlockLoops loops_avx512{keys_avx512_plain, split_avx512,
                                         publish_stream, at_least_avx512_plain};
#endif
#undef FISHERPRUNE_BLOCK_LOOPS
#undef FISHERPRUNE_INLINE

inline const BlockLoops& block_loops() {
#if defined(__x86_64__)
  static const bool bytes_and_bits = __builtin_cpu_supports("avx512bw") &&
                                     __builtin_cpu_supports("avx512vl") &&
                                     __builtin_cpu_supports("popcnt");
  const Capability capability = cpu_capability();
  if (capability == Capability::avx512 && bytes_and_bits) return loops_avx512;
  if (capability != Capability::portable) return loops_avx2;
#endif
  return loops_portable;
}

}  // namespace topk
}  // namespace fisherprune
