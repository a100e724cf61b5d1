// The inner loops of the CPU's global_topk, written by hand for AVX-512, whose
// comparisons give bits, and for AVX2, whose comparisons give bytes that become bits;
// and the choice of the loops.
#pragma once

#include "common/cpu/capability.h"
#include "global_topk/cpu/scan.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fisherprune::cpu::global_topk {

#if defined(__x86_64__)
inline void publish_stream() { _mm_sfence(); }

#define FISHERPRUNE_AVX2 __attribute__((target("avx2,popcnt")))

// Whole cache lines of masks are written past the caches: nothing reads them soon, and
// to fetch them first would double the traffic.
FISHERPRUNE_AVX2 inline int64_t split_avx2(const Block& block, CodeRange range,
                                           uint8_t* mask, Inside& inside) {
  if (block.size % 64) return split_loop(block, range, mask, inside);
  const __m256i low = _mm256_set1_epi8(static_cast<char>(range.low));
  const __m256i high = _mm256_set1_epi8(static_cast<char>(range.high));
  const __m256i one = _mm256_set1_epi8(1);
  const bool whole_lines = reinterpret_cast<uintptr_t>(mask) % 64 == 0;
  int64_t above = 0, listed = 0;
  for (int64_t j = 0; j < block.size; j += 64) {
    uint64_t in = 0;
    for (int part = 0; part < 64; part += 32) {
      const auto* from = reinterpret_cast<const __m256i*>(block.code + j + part);
      auto* to = reinterpret_cast<__m256i*>(mask + j + part);
      const __m256i code = _mm256_load_si256(from);
      const __m256i up_to_high = _mm256_cmpeq_epi8(_mm256_min_epu8(code, high), code);
      const __m256i from_low = _mm256_cmpeq_epi8(_mm256_max_epu8(code, low), code);
      const __m256i bytes = _mm256_andnot_si256(up_to_high, one);
      if (mask)
        whole_lines ? _mm256_stream_si256(to, bytes) : _mm256_storeu_si256(to, bytes);
      const uint32_t within =
          _mm256_movemask_epi8(_mm256_and_si256(up_to_high, from_low));
      above += 32 - __builtin_popcount(_mm256_movemask_epi8(up_to_high));
      in |= uint64_t{within} << part;
    }
    inside.word[j / 64] = in;
    inside.listed[listed] = static_cast<uint8_t>(j / 64);
    listed += in != 0;
  }
  inside.count = listed;
  return above;
}

FISHERPRUNE_AVX2 inline int64_t encode_avx2(Block& block, Coding coding) {
  return encode_loop(block, coding);
}

inline constexpr BlockLoops loops_avx2{encode_avx2, split_avx2, publish_stream};

#define FISHERPRUNE_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,popcnt,bmi,bmi2")))

// It writes whole vectors of codes, but reads no score beyond the last one.
FISHERPRUNE_AVX512 inline int64_t encode_avx512(Block& block, Coding coding) {
  const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  const __m512i zero = _mm512_setzero_si512();
  const __m512i infinity = _mm512_set1_epi32(static_cast<int>(2 * kInfinity));
  const __m512i base = _mm512_set1_epi32(static_cast<int>(coding.base));
  const __m512i top = _mm512_set1_epi32(static_cast<int>(coding.top()));
  const __m128i shift = _mm_cvtsi32_si128(coding.shift);
  const __m512i scale = _mm512_set1_epi16(static_cast<short>(coding.scale));
  const __m512i last = _mm512_set1_epi16(Coding::kLast);
  // The packing below takes four neighbours of each vector in turn: this sorts them.
  const __m512i in_order =
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  constexpr __mmask16 all = 0xffff;  // without it GCC warns of its own header
  __mmask16 nonfinite = 0;
  const auto word = [&](__m512i x) FISHERPRUNE_AVX512 {
    nonfinite |= _mm512_cmpge_epu32_mask(_mm512_add_epi32(x, x), infinity);
    const __m512i key = _mm512_mask_sub_epi32(_mm512_or_si512(x, sign),
                                              _mm512_movepi32_mask(x), zero, x);
    const __m512i within =
        _mm512_maskz_min_epu32(all, _mm512_maskz_max_epu32(all, key, base), top);
    return _mm512_maskz_srl_epi32(all, _mm512_sub_epi32(within, base), shift);
  };
  const auto scaled = [&](__m512i a, __m512i b) FISHERPRUNE_AVX512 {
    const __m512i words = _mm512_packus_epi32(word(a), word(b));
    return _mm512_min_epu16(_mm512_mulhi_epu16(words, scale), last);
  };
  const auto store = [&](int64_t j, __m512i a, __m512i b, __m512i c,
                         __m512i d) FISHERPRUNE_AVX512 {
    const __m512i bytes = _mm512_packus_epi16(scaled(a, b), scaled(c, d));
    _mm512_store_si512(block.code + j,
                       _mm512_maskz_permutexvar_epi32(all, in_order, bytes));
  };
  int64_t j = 0;
  for (; j + 64 <= block.size; j += 64) {
    const float* from = block.scores + j;
    store(j, _mm512_loadu_si512(from), _mm512_loadu_si512(from + 16),
          _mm512_loadu_si512(from + 32), _mm512_loadu_si512(from + 48));
  }
  if (j < block.size) {
    const float* from = block.scores + j;
    const uint64_t there = (uint64_t{1} << (block.size - j)) - 1;
    const auto load = [&](int part) FISHERPRUNE_AVX512 {
      return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(there >> part),
                                      from + part);
    };
    store(j, load(0), load(16), load(32), load(48));
  }
  return nonfinite ? count_nonfinite(block.scores, block.size) : 0;
}

// Writes the masks of `count` neighbours, at most 64.
FISHERPRUNE_AVX512 inline void write_mask(uint64_t bits, int64_t count, uint8_t* mask) {
  const __m512i bytes = _mm512_maskz_mov_epi8(bits, _mm512_set1_epi8(1));
  if (count < 64)
    _mm512_mask_storeu_epi8(mask, (uint64_t{1} << count) - 1, bytes);
  else if (reinterpret_cast<uintptr_t>(mask) % 64 == 0)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(mask), bytes);
  else
    _mm512_storeu_si512(mask, bytes);
}

// Every word is put on the list of words with candidates; the next one overwrites it
// where it has none. A branch would be mispredicted.
FISHERPRUNE_AVX512 inline int64_t split_avx512(const Block& block, CodeRange range,
                                               uint8_t* mask, Inside& inside) {
  const __m512i low = _mm512_set1_epi8(static_cast<char>(range.low));
  const __m512i high = _mm512_set1_epi8(static_cast<char>(range.high));
  int64_t above = 0, listed = 0;
  const auto take = [&](int64_t j, int64_t count) FISHERPRUNE_AVX512 {
    const __m512i code = _mm512_load_si512(block.code + j);
    uint64_t over = _mm512_cmpgt_epu8_mask(code, high);
    uint64_t in = _mm512_mask_cmpge_epu8_mask(~over, code, low);
    if (count < 64) over = _bzhi_u64(over, count), in = _bzhi_u64(in, count);
    if (mask) write_mask(over, count, mask + j);
    above += __builtin_popcountll(over);
    inside.word[j / 64] = in;
    inside.listed[listed] = static_cast<uint8_t>(j / 64);
    listed += in != 0;
  };
  int64_t j = 0;
  for (; j + 64 <= block.size; j += 64) take(j, 64);
  if (j < block.size) take(j, block.size - j);
  inside.count = listed;
  return above;
}

inline constexpr BlockLoops loops_avx512{encode_avx512, split_avx512, publish_stream};

#undef FISHERPRUNE_AVX2
#undef FISHERPRUNE_AVX512
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

}  // namespace fisherprune::cpu::global_topk
