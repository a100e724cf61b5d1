// The inner loops of the CPU's global_topk over one block in the L1 cache, for any
// processor.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "global_topk/contract.h"
#include "global_topk/cpu/tuning.h"

namespace fisherprune::cpu::global_topk {

#define FISHERPRUNE_INLINE inline __attribute__((always_inline))

// Keys from low to high, both included.
struct Bracket {
  uint32_t low, high;
  bool single() const { return low == high; }
};

struct Counts {
  int64_t above = 0, inside = 0;  // of a bracket
};

// How keys become bytes in the same order: (key - base) >> shift, limited to 16 bits,
// is multiplied by scale / 2^16 and limited to 8 bits. To compare bytes takes a quarter
// of the work.
struct Coding {
  uint32_t base = 0;
  int shift = 16;
  uint32_t scale = 256;

  static constexpr uint32_t kLast = 255;

  // All keys from here on have the last code.
  uint32_t top() const {
    const uint64_t top = base + (uint64_t{0xffff} << shift);
    return static_cast<uint32_t>(std::min<uint64_t>(top, 0xffffffffu));
  }
};

FISHERPRUNE_INLINE uint8_t code_of(Coding coding, uint32_t key) {
  const uint32_t within = std::min(std::max(key, coding.base), coding.top());
  const uint32_t scaled = ((within - coding.base) >> coding.shift) * coding.scale >> 16;
  return static_cast<uint8_t>(std::min(scaled, Coding::kLast));
}

// Codes from low to high, both included.
struct CodeRange {
  uint8_t low, high;
};

struct Block {
  alignas(64) uint8_t code[tuning::kBlock];
  const float* scores = nullptr;
  int64_t at = 0, size = 0;  // of the chunk's entries
  int64_t next_size = 0;     // of the next block, behind this one's scores

  // Asks for part i of n of the next block, while this one is worked on. The
  // processor's own prefetching stops at the end of each page, and a block ends about
  // there. Parts, because only few lines can be in flight at a time.
  void prefetch(int64_t i, int64_t n) const {
    constexpr int64_t kLine = 64 / sizeof(float);
    const int64_t lines = ceil_div(next_size, kLine);
    for (int64_t line = lines * i / n; line < lines * (i + 1) / n; ++line)
      __builtin_prefetch(scores + size + kLine * line);
  }
};

// Which scores of a block are inside a range: a bit for each, in words of 64
// neighbours, the first neighbour lowest; and a list of the words that have any.
struct Inside {
  uint64_t word[tuning::kBlock / 64];
  uint8_t listed[tuning::kBlock / 64];
  int64_t count = 0;  // of listed words
};

struct BlockLoops {
  // Writes the codes of the block's scores, returns how many are NaN or infinite.
  int64_t (*encode)(Block& block, Coding coding);
  // Writes the block's mask, 1 where a score is above the range and 0 elsewhere, unless
  // it is null; lists the scores inside; returns how many are above.
  int64_t (*split)(const Block& block, CodeRange range, uint8_t* mask, Inside& inside);
  // Makes masks that were written past the caches visible to all threads.
  void (*publish)();
};

// The bits of a float without its sign: below kInfinity where it is finite.
inline uint32_t magnitude_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits & 0x7fffffffu;
}

constexpr uint32_t kInfinity = 0x7f800000u;

inline int64_t count_nonfinite(const float* scores, int64_t size) {
  return std::count_if(scores, scores + size,
                       [](float x) { return magnitude_of(x) >= kInfinity; });
}

FISHERPRUNE_INLINE int64_t encode_loop(Block& block, Coding coding) {
  uint32_t largest = 0;
  for (int64_t j = 0; j < block.size; ++j) {
    largest = std::max(largest, magnitude_of(block.scores[j]));
    block.code[j] = code_of(coding, key_of(block.scores[j]));
  }
  return largest < kInfinity ? 0 : count_nonfinite(block.scores, block.size);
}

// Packs eight bytes, each 0 or 1, into the bits of one: the first byte is the lowest.
FISHERPRUNE_INLINE uint64_t pack_bytes(const uint8_t* bytes) {
  uint64_t x;
  memcpy(&x, bytes, sizeof x);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  x = __builtin_bswap64(x);
#endif
  return x * 0x0102040810204080u >> 56;  // byte i goes 56 - 7 i bits up
}

FISHERPRUNE_INLINE int64_t split_loop(const Block& block, CodeRange range,
                                      uint8_t* mask, Inside& inside) {
  const uint8_t width = range.high - range.low;
  uint8_t over[tuning::kBlock],
      in[tuning::kBlock];  // to vectorize: the mask might overlap the codes
  int64_t above = 0;
  for (int64_t j = 0; j < block.size; ++j) {
    over[j] = block.code[j] > range.high;
    in[j] = static_cast<uint8_t>(block.code[j] - range.low) <= width;
    above += over[j];
  }
  if (mask) memcpy(mask, over, block.size);
  memset(in + block.size, 0, tuning::kBlock - block.size);
  inside.count = 0;
  for (int64_t j = 0; j < block.size; j += 64) {
    uint64_t& word = inside.word[j / 64];
    word = 0;
    for (int i = 0; i < 64; i += 8) word |= pack_bytes(in + j + i) << i;
    inside.listed[inside.count] = static_cast<uint8_t>(j / 64);
    inside.count += word != 0;
  }
  return above;
}

inline void publish_nothing() {}

inline constexpr BlockLoops loops_portable{encode_loop, split_loop, publish_nothing};

}  // namespace fisherprune::cpu::global_topk
