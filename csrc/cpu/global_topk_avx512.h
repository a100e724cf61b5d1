// The inner loops of the CPU's global_topk by hand for AVX-512, whose comparisons make
// bits; and the choice of the loops.
#pragma once

#include "capability.h"
#include "global_topk_scan.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fisherprune {
namespace topk {

#if defined(__x86_64__)
#define FISHERPRUNE_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,popcnt,bmi,bmi2")))

// Whole vectors of keys are written; the scores are read up to their end.
FISHERPRUNE_AVX512 inline int64_t load_avx512(const float* scores, Block& block) {
  const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  const __m512i zero = _mm512_setzero_si512();
  const __m512i infinity = _mm512_set1_epi32(static_cast<int>(2 * kInfinity));
  __mmask16 nonfinite = 0;
  const auto take = [&](int64_t j, __m512i x) FISHERPRUNE_AVX512 {
    nonfinite |= _mm512_cmpge_epu32_mask(_mm512_add_epi32(x, x), infinity);
    const __m512i key = _mm512_mask_sub_epi32(_mm512_or_si512(x, sign),
                                              _mm512_movepi32_mask(x), zero, x);
    _mm512_store_si512(block.key + j, key);
  };
  int64_t j = 0;
  for (; j + 16 <= block.size; j += 16) take(j, _mm512_loadu_si512(scores + j));
  if (j < block.size) {
    const auto there = static_cast<__mmask16>((1u << (block.size - j)) - 1);
    take(j, _mm512_maskz_loadu_epi32(there, scores + j));
  }
  return nonfinite ? count_nonfinite(scores, block.size) : 0;
}

// The masks of `count` neighbours, at most 64. A whole line is written past the caches,
// where it may be: nothing reads it soon, and to fetch it first would double the
// traffic.
FISHERPRUNE_AVX512 inline void write_mask(uint64_t bits, int64_t count, uint8_t* mask) {
  const __m512i bytes = _mm512_maskz_mov_epi8(bits, _mm512_set1_epi8(1));
  if (count < 64)
    _mm512_mask_storeu_epi8(mask, (uint64_t{1} << count) - 1, bytes);
  else if (reinterpret_cast<uintptr_t>(mask) % 64 == 0)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(mask), bytes);
  else
    _mm512_storeu_si512(mask, bytes);
}

inline void publish_stream() { _mm_sfence(); }

// Writes the keys whose bits are set, mostly one or two, and returns how many they are.
FISHERPRUNE_AVX512 inline int32_t gather(const uint32_t* key, uint64_t inside,
                                         uint32_t* found) {
  const int32_t count = __builtin_popcountll(inside);
  if (count <= 2) {
    found[0] = key[__builtin_ctzll(inside)];
    found[1] = key[63 - __builtin_clzll(inside)];
    return count;
  }
  for (int part = 0; part < 64; part += 16) {
    const auto some = static_cast<__mmask16>(inside >> part);
    const __m512i x = _mm512_loadu_si512(key + part);
    _mm512_storeu_si512(found + __builtin_popcountll(_bzhi_u64(inside, part)),
                        _mm512_maskz_compress_epi32(some, x));
  }
  return count;
}

// 64 keys at a time. Every word is put on the list of those with candidates, and
// written over where it does not belong there: a branch would be mispredicted.
FISHERPRUNE_AVX512 inline BlockCounts split_avx512(const Block& block, Bracket bracket,
                                                   uint8_t* mask, Word* words,
                                                   uint32_t* found) {
  const __m512i low = _mm512_set1_epi32(static_cast<int>(bracket.low));
  const __m512i high = _mm512_set1_epi32(static_cast<int>(bracket.high));
  BlockCounts counts{};
  const auto take = [&](int64_t j, int64_t count) FISHERPRUNE_AVX512 {
    uint64_t above = 0, inside = 0;  // inside: first those from low on
    for (int part = 0; part < 64; part += 16) {
      const __m512i x = _mm512_load_si512(block.key + j + part);
      above |= uint64_t{_mm512_cmpgt_epu32_mask(x, high)} << part;
      inside |= uint64_t{_mm512_cmpge_epu32_mask(x, low)} << part;
    }
    inside &= ~above;
    if (count < 64) above = _bzhi_u64(above, count), inside = _bzhi_u64(inside, count);
    write_mask(above, count, mask + block.at + j);
    words[counts.words] = {above, inside, block.at + j};
    counts.words += inside != 0;
    counts.above += __builtin_popcountll(above);
  };
  int64_t j = 0;
  for (; j + 64 <= block.size; j += 64) take(j, 64);
  if (j < block.size) take(j, block.size - j);
  for (int32_t w = 0; w < counts.words; ++w)
    counts.inside += gather(block.key + words[w].at - block.at, words[w].inside,
                            found + counts.inside);
  return counts;
}

FISHERPRUNE_AVX512 inline void settle_avx512(const Word* words, int64_t count,
                                             const uint32_t* found, uint32_t threshold,
                                             int64_t ties, int64_t size,
                                             uint8_t* mask) {
  const __m512i level = _mm512_set1_epi32(static_cast<int>(threshold));
  for (int64_t w = 0; w < count; ++w) {
    const Word word = words[w];
    const int candidates = __builtin_popcountll(word.inside);
    uint64_t above = 0, equal = 0;  // of the candidates; bits after the last are void
    for (int i = 0; i < candidates; i += 16) {
      const __m512i x = _mm512_loadu_si512(found + i);
      above |= uint64_t{_mm512_cmpgt_epu32_mask(x, level)} << i;
      equal |= uint64_t{_mm512_cmpeq_epu32_mask(x, level)} << i;
    }
    found += candidates;
    above = _pdep_u64(above, word.inside), equal = _pdep_u64(equal, word.inside);
    if (equal) {
      const int here = __builtin_popcountll(equal);
      if (here > ties) equal = _pdep_u64((uint64_t{1} << ties) - 1, equal);
      ties -= std::min<int64_t>(here, ties);
    }
    write_mask(word.above | above | equal, size - word.at, mask + word.at);
  }
}

inline constexpr BlockLoops loops_avx512{load_avx512, split_avx512, settle_avx512,
                                         publish_stream, at_least_avx512_plain};
#endif
#undef FISHERPRUNE_INLINE

inline const BlockLoops& block_loops() {
#if defined(__x86_64__)
  static const bool bytes_and_bits =
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("bmi2");
  const Capability capability = cpu_capability();
  if (capability == Capability::avx512 && bytes_and_bits) return loops_avx512;
  if (capability != Capability::portable) return loops_avx2;
#endif
  return loops_portable;
}

}  // namespace topk
}  // namespace fisherprune
