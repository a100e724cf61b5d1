// The inner loops of the CPU's global_topk: plain loops over one block in the L1 cache,
// compiled for several instruction sets, chosen at run time.
#pragma once

#include <cstdint>

#include "../global_topk.h"

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

struct BlockLoops {
  // Writes the keys of `size` scores, returns how many scores are NaN or infinite.
  int64_t (*keys)(const float* scores, int64_t size, uint32_t* key);
  // mask = above the bracket, inside = in the bracket, as bytes 0 and 1.
  Counts (*split)(const uint32_t* key, int64_t size, Bracket bracket, uint8_t* mask,
                  uint8_t* inside);
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

FISHERPRUNE_INLINE Counts split_loop(const uint32_t* key, int64_t size, Bracket bracket,
                                     uint8_t* mask, uint8_t* inside) {
  const uint32_t width = bracket.high - bracket.low;
  int32_t above = 0, within = 0;
  for (int64_t j = 0; j < size; ++j) {
    const bool is_above = key[j] > bracket.high;
    const bool is_inside = key[j] - bracket.low <= width;
    mask[j] = is_above, inside[j] = is_inside;
    above += is_above, within += is_inside;
  }
  return {above, within};
}

FISHERPRUNE_INLINE void at_least_loop(const uint32_t* key, int64_t size, uint32_t least,
                                      uint8_t* mask) {
  for (int64_t j = 0; j < size; ++j) mask[j] = key[j] >= least;
}

// The loops inlined into functions of their own, compiled for the TARGET.
#define FISHERPRUNE_BLOCK_LOOPS(NAME, TARGET)                                     \
  TARGET inline int64_t keys_##NAME(const float* scores, int64_t size,            \
                                    uint32_t* key) {                              \
    return keys_loop(scores, size, key);                                          \
  }                                                                               \
  TARGET inline Counts split_##NAME(const uint32_t* key, int64_t size, Bracket b, \
                                    uint8_t* mask, uint8_t* inside) {             \
    return split_loop(key, size, b, mask, inside);                                \
  }                                                                               \
  TARGET inline void at_least_##NAME(const uint32_t* key, int64_t size,           \
                                     uint32_t least, uint8_t* mask) {             \
    at_least_loop(key, size, least, mask);                                        \
  }                                                                               \
  inline constexpr BlockLoops loops_##NAME{keys_##NAME, split_##NAME, at_least_##NAME};

FISHERPRUNE_BLOCK_LOOPS(portable, )
#if defined(__x86_64__)
FISHERPRUNE_BLOCK_LOOPS(avx2, __attribute__((target("avx2"))))
FISHERPRUNE_BLOCK_LOOPS(avx512, __attribute__((target("avx512f,avx512bw,avx512vl"))))
#endif
#undef FISHERPRUNE_BLOCK_LOOPS
#undef FISHERPRUNE_INLINE

inline const BlockLoops& block_loops() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return loops_avx512;
  if (__builtin_cpu_supports("avx2")) return loops_avx2;
#endif
  return loops_portable;
}

}  // namespace topk
}  // namespace fisherprune
