// The counting pass: narrows brackets that hold too many entries to collect them.
#pragma once

#include <mutex>

#include "global_topk/cpu/task.h"

namespace fisherprune::cpu::global_topk {

// Counts of the keys in a bracket, by their leading digits. Two copies take turns: an
// addition need not wait for the one before it, where neighbours are equal. The last
// bin counts the keys outside.
struct Histogram {
  Bracket bracket;
  int shift = 0;
  int64_t bins = 0, above = 0;
  std::vector<int64_t> count;

  Histogram(Bracket b, int low_bits)
      : bracket(b), shift(low_bits), bins(((b.high - b.low) >> low_bits) + int64_t{1}) {
    count.resize(2 * (bins + 1));
  }

  void add(const float* scores, int64_t size) {
    const uint32_t width = bracket.high - bracket.low, none = bins;
    int64_t* const copies[] = {count.data(), count.data() + bins + 1};
    for (int64_t j = 0; j < size; ++j) {
      const uint32_t key = key_of(scores[j]), distance = key - bracket.low;
      above += key > bracket.high;
      ++copies[j & 1][distance <= width ? distance >> shift : none];
    }
  }

  void add(uint32_t key) { ++count[(key - bracket.low) >> shift]; }  // in the bracket

  void add(const Histogram& other) {
    above += other.above;
    for (size_t i = 0; i < count.size(); ++i) count[i] += other.count[i];
  }

  int64_t at(int64_t bin) const { return count[bin] + count[bins + 1 + bin]; }
};

// Fills all histograms in one pass over the scores.
inline void fill(const Task& task, std::vector<Histogram>& histograms) {
  std::mutex mutex;
  const std::vector<Histogram> empty = histograms;
  for_each_task(
      task.parallel, task.chunks.size(), [&] { return empty; },
      [&](int64_t c, std::vector<Histogram>& mine) {
        for_each_block(task, task.chunks[c], [&](const Block& block) {
          block.prefetch(0, 1);
          for (Histogram& h : mine) h.add(block.scores, block.size);
        });
      },
      [&](const std::vector<Histogram>& mine) {
        const std::lock_guard<std::mutex> lock(mutex);
        for (size_t i = 0; i < mine.size(); ++i) histograms[i].add(mine[i]);
      });
}

// Learns how many entries lie above and in the proposed bracket. Returns whether the
// k-th largest is in it.
inline bool learn(Query& q, Counts counts) {
  Known& known = q.known;
  const Bracket b = q.next.bracket;
  if (counts.above >= q.keep) {  // too low
    known.bracket.low = b.high + 1;
    known.inside = counts.above - known.above;
  } else if (counts.above + counts.inside < q.keep) {  // too high
    known.bracket.high = b.low - 1;
    known.inside -= counts.above + counts.inside - known.above;
    known.above = counts.above + counts.inside;
  } else {
    known.bracket = b;
    known.above = counts.above, known.inside = counts.inside;
    return true;
  }
  ++known.misses;
  return false;
}

inline void learn(Query& q, const Histogram& h) {
  Counts counts{h.above, 0};
  for (int64_t bin = 0; bin < h.bins; ++bin) counts.inside += h.at(bin);
  if (!learn(q, counts)) return;
  int64_t bin = h.bins - 1;
  for (; q.known.above + h.at(bin) < q.keep; --bin) q.known.above += h.at(bin);
  const uint32_t low = h.bracket.low + (static_cast<uint32_t>(bin) << h.shift);
  const uint32_t width = (uint32_t{1} << h.shift) - 1;
  const uint32_t high = h.bracket.high - low > width ? low + width : h.bracket.high;
  q.known.bracket = {low, high};
  q.known.inside = h.at(bin);
}

// Divides a bracket into at most tuning::kBins equal parts.
inline Histogram narrowing(Bracket b) {
  int shift = 0;
  while ((b.high - b.low) >> shift >= tuning::kBins) ++shift;
  return Histogram(b, shift);
}

inline void count_pass(const Task& task, const Queries& queries) {
  std::vector<Histogram> histograms;
  for (const Query* q : queries) histograms.push_back(narrowing(q->next.bracket));
  fill(task, histograms);
  for (size_t i = 0; i < queries.size(); ++i) learn(*queries[i], histograms[i]);
}

}  // namespace fisherprune::cpu::global_topk
