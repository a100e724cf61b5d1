// The inner loops of the CPU's global_topk: plain loops over one block in the L1 cache,
// compiled for several instruction sets, chosen at run time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../global_topk.h"

namespace fisherprune {
namespace topk {

constexpr int64_t kBlock = 2048;  // keys that stay in the L1 cache between the loops

// Keys from low to high, both included.
struct Bracket {
  uint32_t low, high;
  bool single() const { return low == high; }
};

struct Counts {
  int64_t above = 0, inside = 0;  // of a bracket
};

struct Block {
  alignas(64) uint32_t key[kBlock];
  int64_t at = 0, size = 0;  // of the chunk's entries
  const float* next = nullptr;
  int64_t next_size = 0;

  // Asks for part i of n of the next block, while this one is worked on: the
  // processor's own prefetching stops at the end of each page, which is about where a
  // block ends. In parts, because few lines can be under way at a time.
  void prefetch(int64_t i, int64_t n) const {
    constexpr int64_t kLine = 64 / sizeof(float);
    const int64_t lines = (next_size + kLine - 1) / kLine;
    for (int64_t line = lines * i / n; line < lines * (i + 1) / n; ++line)
      __builtin_prefetch(next + kLine * line);
  }
};

// 64 neighbours, some of them candidates: the bits of those above the bracket, where
// settle() wants them, and of those inside, the first neighbour lowest.
struct Word {
  uint64_t above, inside;
  int64_t at;  // of the first neighbour, in the chunk
};

// Of one block. Small enough to be returned in registers: through memory they would
// wait for the mask's bytes, which are on their way there before them.
struct BlockCounts {
  int32_t above, inside, words;
};

constexpr int64_t kBeyond = 16;  // keys that vectors may touch past the last

struct BlockLoops {
  // Writes the keys of the block's scores, returns how many are NaN or infinite.
  int64_t (*load)(const float* scores, Block& block);
  // Lists all words that hold candidates, and the candidates' keys. The chunk's mask =
  // above the bracket, as bytes 0 and 1; words listed may be left to settle().
  // There must be room for the words of a block, and for its keys and kBeyond more.
  BlockCounts (*split)(const Block& block, Bracket bracket, uint8_t* mask, Word* words,
                       uint32_t* found);
  // The masks of the words, in a chunk of this size = above the bracket, or a candidate
  // above the threshold, or one of the first `ties` that equal it. kBeyond keys after
  // the candidates' are readable.
  void (*settle)(const Word* words, int64_t count, const uint32_t* found,
                 uint32_t threshold, int64_t ties, int64_t size, uint8_t* mask);
  // Waits until the masks written past the caches are there for all threads.
  void (*publish)();
  // mask = at least `least`.
  void (*at_least)(const uint32_t* key, int64_t size, uint32_t least, uint8_t* mask);
};

#define FISHERPRUNE_INLINE inline __attribute__((always_inline))

// Of a float without its sign: all that are finite are below kInfinity.
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

FISHERPRUNE_INLINE int64_t load_loop(const float* scores, Block& block) {
  uint32_t largest = 0;
  for (int64_t j = 0; j < block.size; ++j) {
    largest = std::max(largest, magnitude_of(scores[j]));
    block.key[j] = key_of(scores[j]);
  }
  return largest < kInfinity ? 0 : count_nonfinite(scores, block.size);
}

// Eight bytes 0 or 1 as the bits of one, the first byte lowest.
FISHERPRUNE_INLINE uint64_t pack_bytes(const uint8_t* bytes) {
  uint64_t x = 0;
  for (int i = 0; i < 8; ++i) x |= uint64_t{bytes[i]} << i;
  return x;
}

// Writes the whole mask: settle_loop() has only the candidates to put right.
FISHERPRUNE_INLINE BlockCounts split_loop(const Block& block, Bracket bracket,
                                          uint8_t* mask, Word* words, uint32_t* found) {
  const uint32_t width = bracket.high - bracket.low;
  uint8_t over[kBlock], in[kBlock];  // to vectorize: the mask might overlap the keys
  BlockCounts counts{};
  for (int64_t j = 0; j < block.size; ++j) {
    over[j] = block.key[j] > bracket.high;
    in[j] = block.key[j] - bracket.low <= width;
    counts.above += over[j];
  }
  memcpy(mask + block.at, over, block.size);
  memset(in + block.size, 0, kBlock - block.size);
  for (int64_t j = 0; j < block.size; j += 64) {
    Word word{0, 0, block.at + j};
    for (int i = 0; i < 64; i += 8) word.inside |= pack_bytes(in + j + i) << i;
    if (word.inside == 0) continue;
    words[counts.words++] = word;
    for (uint64_t left = word.inside; left; left &= left - 1)
      found[counts.inside++] = block.key[j + __builtin_ctzll(left)];
  }
  return counts;
}

FISHERPRUNE_INLINE void settle_loop(const Word* words, int64_t count,
                                    const uint32_t* found, uint32_t threshold,
                                    int64_t ties, int64_t, uint8_t* mask) {
  for (int64_t w = 0; w < count; ++w)
    for (uint64_t left = words[w].inside; left; left &= left - 1, ++found)
      mask[words[w].at + __builtin_ctzll(left)] =
          *found > threshold || (*found == threshold && ties-- > 0);
}

FISHERPRUNE_INLINE void at_least_loop(const uint32_t* key, int64_t size, uint32_t least,
                                      uint8_t* mask) {
  for (int64_t j = 0; j < size; ++j) mask[j] = key[j] >= least;
}

inline void publish_nothing() {}

// The loops inlined into functions of their own, compiled for the TARGET.
#define FISHERPRUNE_BLOCK_LOOPS(NAME, TARGET)                                        \
  TARGET inline int64_t load_##NAME(const float* scores, Block& block) {             \
    return load_loop(scores, block);                                                 \
  }                                                                                  \
  TARGET inline BlockCounts split_##NAME(const Block& block, Bracket bracket,        \
                                         uint8_t* mask, Word* words,                 \
                                         uint32_t* found) {                          \
    return split_loop(block, bracket, mask, words, found);                           \
  }                                                                                  \
  TARGET inline void settle_##NAME(const Word* words, int64_t count,                 \
                                   const uint32_t* found, uint32_t threshold,        \
                                   int64_t ties, int64_t size, uint8_t* mask) {      \
    settle_loop(words, count, found, threshold, ties, size, mask);                   \
  }                                                                                  \
  TARGET inline void at_least_##NAME(const uint32_t* key, int64_t size,              \
                                     uint32_t least, uint8_t* mask) {                \
    at_least_loop(key, size, least, mask);                                           \
  }                                                                                  \
  inline constexpr BlockLoops loops_##NAME{load_##NAME, split_##NAME, settle_##NAME, \
                                           publish_nothing, at_least_##NAME};

FISHERPRUNE_BLOCK_LOOPS(portable, )
#if defined(__x86_64__)
FISHERPRUNE_BLOCK_LOOPS(avx2, __attribute__((target("avx2"))))
FISHERPRUNE_BLOCK_LOOPS(avx512_plain,
                        __attribute__((target("avx512f,avx512bw,avx512vl"))))
#endif
#undef FISHERPRUNE_BLOCK_LOOPS

}  // namespace topk
}  // namespace fisherprune
