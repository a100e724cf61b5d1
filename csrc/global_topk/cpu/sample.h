// Where to look for the k-th largest key: a sorted sample of the scores proposes a
// narrow bracket. A wrong proposal costs a pass, never exactness.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "common/cpu/parallel.h"
#include "common/integers.h"
#include "global_topk/cpu/scan.h"

namespace fisherprune::cpu::global_topk {

struct Sample {
  std::vector<uint32_t> keys;  // each piece of tuning::kSamplePiece ascending
  int64_t total = 0;           // scores it was drawn from

  int64_t size() const { return static_cast<int64_t>(keys.size()); }

  // How many of the keys are below this one.
  int64_t below(uint64_t key) const {
    int64_t count = 0;
    for (int64_t i = 0; i < size(); i += tuning::kSamplePiece) {
      const auto first = keys.begin() + i;
      const auto last = keys.begin() + std::min(size(), i + tuning::kSamplePiece);
      count += std::lower_bound(first, last, key) - first;
    }
    return count;
  }

  // The key that has `rank` others below it, or equal and before it.
  uint32_t at(int64_t rank) const {
    uint32_t key = 0;
    for (uint32_t bit = 1u << 31; bit; bit >>= 1)
      if (below(key | bit) <= rank) key |= bit;
    return key;
  }

  // Ranks of the first and of one past the last of the keys in the bracket.
  std::array<int64_t, 2> range(Bracket b) const {
    return {below(b.low), below(uint64_t{b.high} + 1)};
  }

  // How many of all scores lie in the bracket, by the sample.
  int64_t estimate(Bracket b) const {
    const auto [first, last] = range(b);
    return size() ? (last - first) * (total / size() + 1) : total;
  }
};

// Sorts a piece ascending, by the digits from the least significant up.
inline void radix_sort(uint32_t* keys, int64_t size) {
  constexpr int kBits = 11, kRounds = 3;
  std::vector<uint32_t> other(keys, keys + size);
  uint32_t *from = keys, *to = other.data();
  for (int shift = 0; shift < kRounds * kBits; shift += kBits) {
    std::array<uint32_t, (1 << kBits) + 1> place{};
    const auto digit = [&](uint32_t key) { return key >> shift & ((1 << kBits) - 1); };
    for (int64_t i = 0; i < size; ++i) ++place[digit(from[i]) + 1];
    for (int i = 0; i < 1 << kBits; ++i) place[i + 1] += place[i];
    for (int64_t i = 0; i < size; ++i) to[place[digit(from[i])]++] = from[i];
    std::swap(from, to);
  }
  std::copy_n(from, size, keys);
}

// A place in [0, width) that follows no pattern: a pattern in the scores cannot mislead
// the sample.
inline int64_t scattered(uint64_t i, uint32_t width) {
  i = (i + 1) * 0x9e3779b97f4a7c15u;
  i = (i ^ i >> 32) * 0xd6e8feb86659fd93u;
  return static_cast<int64_t>((i >> 32) * width >> 32);
}

// One score of each of about (total * queries)^(2/3) equal stretches. With this size
// the time to read the sample grows like the time to collect the entries of all
// brackets. Nearly every score of the sample lies in a page of its own: many are asked
// for before the first one is used.
inline Sample draw_sample(const std::vector<Scores>& scores, int64_t queries,
                          const Parallel& parallel) {
  Sample sample;
  std::vector<int64_t> ends;
  for (const Scores& s : scores) ends.push_back(sample.total += s.size);
  if (sample.total <= tuning::kSampleFrom) return sample;
  const double total = static_cast<double>(sample.total);
  const double work = total * std::max<int64_t>(queries, 1);
  const int64_t size = std::min<int64_t>(
      {static_cast<int64_t>(tuning::kSampleScale * std::pow(work, 2. / 3)),
       tuning::kSampleMost, sample.total / 4});
  const double stretch = total / size;
  sample.keys.resize(size);
  for_each_task(parallel, ceil_div(size, tuning::kSamplePiece), [&](int64_t piece) {
    const int64_t last = std::min(size, (piece + 1) * tuning::kSamplePiece);
    const float* places[tuning::kAhead];
    size_t t = 0;
    for (int64_t i = piece * tuning::kSamplePiece; i < last; i += tuning::kAhead) {
      const int64_t count = std::min(tuning::kAhead, last - i);
      for (int64_t j = 0; j < count; ++j) {
        const int64_t at =
            static_cast<int64_t>((i + j) * stretch) + scattered(i + j, stretch);
        while (at >= ends[t]) ++t;
        places[j] = scores[t].data + (at - ends[t] + scores[t].size);
        __builtin_prefetch(places[j]);
      }
      for (int64_t j = 0; j < count; ++j) sample.keys[i + j] = key_of(*places[j]);
    }
    radix_sort(sample.keys.data() + piece * tuning::kSamplePiece,
               last - piece * tuning::kSamplePiece);
  });
  return sample;
}

// What is known for certain of the k-th largest key.
struct Known {
  Bracket bracket{0, 0xffffffffu};  // it lies here
  int64_t above = 0, inside = 0;    // entries above and in the bracket
  int misses = 0;                   // proposals that were wrong
};

struct Proposal {
  Bracket bracket;
  bool crowded;  // more entries in it than may be collected
};

// Whether one value, which is likely the k-th largest, makes up a large part of a
// bracket.
inline bool mostly_one(const Sample& sample, Bracket b, uint32_t likely) {
  const auto [first, last] = sample.range(b);
  const auto [equal, unequal] = sample.range({likely, likely});
  return 4 * (unequal - equal) >= last - first;
}

// Proposes three standard deviations of the sample's rank on either side of k, within
// the known bracket; more after each miss.
inline Proposal propose(const Sample& sample, const Known& known, int64_t keep,
                        int64_t most) {
  const auto [first, last] = sample.range(known.bracket);
  if (first == last)
    return {known.bracket, known.inside > most && !known.bracket.single()};
  const double size = sample.size(), total = sample.total;
  const double kept = keep / total, rank = (1 - kept) * size;
  const double spread = (3 * std::sqrt(size * kept * (1 - kept)) + 16) *
                        std::pow(4., std::min(known.misses, 20));
  const auto at = [&, first = first, last = last](double r) {
    return sample.at(static_cast<int64_t>(std::clamp<double>(r, first, last - 1)));
  };
  Bracket b{at(rank - spread), at(rank + spread)};
  if (rank - spread < first) b.low = known.bracket.low;
  if (rank + spread > last - 1) b.high = known.bracket.high;
  const bool all = b.low == known.bracket.low && b.high == known.bracket.high;
  const bool crowded = (all ? known.inside : 2 * sample.estimate(b)) > most;
  if (crowded && known.misses < 2 && mostly_one(sample, b, at(rank)))
    return {{at(rank), at(rank)}, false};
  return {b, crowded && !b.single()};
}

}  // namespace fisherprune::cpu::global_topk
