// Tuning constants of global_topk on the CPU. The results are exact whatever they are,
// within the bounds that are asserted.
#pragma once

#include <cstdint>

namespace fisherprune::cpu::global_topk::tuning {

// Scores that stay in the first-level cache between the loops over them. The loops make
// bits of them in words of 64, and list the words by their numbers.
constexpr int64_t kBlock = 2048;
static_assert(kBlock % 64 == 0 && kBlock / 64 - 1 <= UINT8_MAX,
              "whole words, whose numbers take 8 bits");

// Scores of one task.
constexpr int64_t kChunk = 32 * kBlock;
static_assert(kChunk % kBlock == 0 && kChunk - 1 <= UINT16_MAX,
              "whole blocks, and a place in a chunk takes 16 bits");

// Up to so many scores are all collected, without a sample.
constexpr int64_t kSampleFrom = int64_t{1} << 16;
static_assert(kSampleFrom >= 4, "a sample takes one in four scores, and at least one");

// The size of a sample: at most, and the time to collect an entry over the time to read
// one, to the power of 2 / 3.
constexpr int64_t kSampleMost = int64_t{1} << 19;
constexpr double kSampleScale = 0.7;
static_assert(kSampleMost >= 1 && kSampleScale > 0, "a sample holds something");

// Keys of the sample that are sorted at a time, in the first-level cache.
constexpr int64_t kSamplePiece = 1 << 13;
static_assert(kSamplePiece >= 1);

// Scores of the sample that are asked for before the first is used.
constexpr int64_t kAhead = 64;
static_assert(kAhead >= 1);

// Bins of a histogram that narrows a bracket.
constexpr int64_t kBins = 2048;
static_assert(kBins >= 2, "with one bin a bracket would never get narrower");

// A coding may be shared where each bracket grows by at most this share of all entries:
// to collect so many takes as long as to code all entries once more.
constexpr int64_t kCodingShare = 256;
static_assert(kCodingShare >= 1);

// Masks that are asked for before the first is written.
constexpr int64_t kTogether = 256;
static_assert(kTogether >= 1);

}  // namespace fisherprune::cpu::global_topk::tuning
