// global_topk on the CPU, free of torch.
//
// A sorted sample brackets the k-th largest key so narrowly that about one entry in a
// hundred lies inside. One pass over the scores writes the masks of all that is above
// the bracket, and collects the entries inside; the k-th largest of those is the
// threshold, and their masks are put right by index. So the scores are read once and
// the masks written once. A bracket that missed is moved, one that is too crowded to
// collect is narrowed by a histogram, until the k-th largest is among the collected, or
// alone in its bracket: then only the chunks that keep ties are read once more.
//
// Threads take chunks of fixed size; ties are shared out over chunks in order, so
// nothing depends on the number of threads.
#pragma once

#include <memory>
#include <mutex>

#include "global_topk_sample.h"

namespace fisherprune {
namespace topk {

constexpr int64_t kChunk = 32 * kBlock;
constexpr int64_t kBins = 2048;  // of a narrowing histogram

// A piece of one tensor, the unit of work.
struct Chunk {
  int64_t tensor, first, size;
};

// An entry in the bracket: its key, and its place in the chunk.
struct Candidate {
  uint32_t key;
  int32_t at;
};

// What one chunk holds for one query.
struct Find {
  Counts counts;
  std::vector<Candidate> candidates;  // by place
  int64_t ties = 0;                   // how many equal to the threshold to keep
};

// The masks of the `keep` largest entries: where the search for their threshold stands.
struct Query {
  Query(int64_t k, std::vector<uint8_t*> bytes) : keep(k), masks(std::move(bytes)) {}

  int64_t keep;
  std::vector<uint8_t*> masks;  // one per tensor
  bool fixed = false;           // the threshold is given: only look there
  bool done = false;
  Known known;
  Proposal next{};
  std::vector<Find> finds;  // one per chunk
  uint32_t threshold = 0;

  bool collects() const { return !done && !next.crowded; }
  bool counts() const { return !done && next.crowded; }
};

// A query for the entries above a threshold and some of those equal to it.
inline Query fixed_query(std::vector<uint8_t*> masks, float threshold) {
  const uint32_t key = key_of(threshold);
  Query query(0, std::move(masks));
  query.fixed = true;
  query.next = {{key, key}, false};
  query.threshold = key;
  return query;
}

struct Task {
  std::vector<Scores> scores;
  Parallel parallel;
  std::vector<Chunk> chunks;
  int64_t total = 0;

  Task(std::vector<Scores> list, Parallel run)
      : scores(std::move(list)), parallel(std::move(run)) {
    for (size_t i = 0; i < scores.size(); ++i) {
      total += scores[i].size;
      for (int64_t at = 0; at < scores[i].size; at += kChunk)
        chunks.push_back(
            {static_cast<int64_t>(i), at, std::min(kChunk, scores[i].size - at)});
    }
  }

  // The most entries that are worth collecting: their memory is half of the scores'.
  int64_t most_candidates() const {
    return std::max<int64_t>(total / 16, 2 * kSampleFrom);
  }
};

// Asks for the next block while one is worked on: the processor's own prefetching stops
// at the end of each page, which is about where a block ends.
inline void prefetch(const float* data, int64_t size) {
  for (int64_t j = 0; j < size; j += 16) __builtin_prefetch(data + j);
}

// Calls work(keys, size, offset in the chunk) for each block, returns the nonfinite.
template <class Work>
int64_t for_each_block(const Task& task, const Chunk& chunk, const Work& work) {
  uint32_t key[kBlock];
  int64_t nonfinite = 0;
  const float* data = task.scores[chunk.tensor].data + chunk.first;
  for (int64_t at = 0; at < chunk.size; at += kBlock) {
    const int64_t size = std::min(kBlock, chunk.size - at);
    prefetch(data + at + size, std::min(kBlock, chunk.size - at - size));
    nonfinite += block_loops().keys(data + at, size, key);
    work(key, size, at);
  }
  return nonfinite;
}

// Appends the entries whose byte in `inside` is 1, without a branch to mispredict: few
// are, so first lists the groups of eight that hold any. The bytes behind the last must
// be 0 up to a multiple of eight.
inline void append(std::vector<Candidate>& candidates, const uint32_t* key,
                   const uint8_t* inside, int64_t size, int64_t at) {
  int16_t groups[kBlock / 8];
  Candidate found[kBlock];
  int64_t group_count = 0, count = 0;
  for (int64_t j = 0; j < size; j += 8) {
    uint64_t any;
    memcpy(&any, inside + j, sizeof any);
    groups[group_count] = static_cast<int16_t>(j);
    group_count += any != 0;
  }
  for (int64_t g = 0; g < group_count; ++g)
    for (int64_t j = groups[g]; j < groups[g] + 8; ++j) {
      found[count] = {key[j], static_cast<int32_t>(at + j)};
      count += inside[j];
    }
  candidates.insert(candidates.end(), found, found + count);
}

using Queries = std::vector<Query*>;

// Writes the masks of all above the brackets, collects what is inside, while there is
// room; returns the chunk's nonfinite entries.
inline int64_t collect_chunk(const Task& task, int64_t c, const Queries& queries,
                             std::atomic<int64_t>* collected) {
  const Chunk& chunk = task.chunks[c];
  std::vector<bool> collects(queries.size());
  for (size_t q = 0; q < queries.size(); ++q) {
    queries[q]->finds[c] = Find();
    collects[q] = !queries[q]->next.bracket.single() &&
                  collected[q].load() <= task.most_candidates();
  }
  const auto block = [&](const uint32_t* key, int64_t size, int64_t at) {
    uint8_t inside[kBlock + 8];
    memset(inside + size, 0, 8);
    for (size_t q = 0; q < queries.size(); ++q) {
      Find& find = queries[q]->finds[c];
      uint8_t* mask = queries[q]->masks[chunk.tensor] + chunk.first + at;
      const Counts counts =
          block_loops().split(key, size, queries[q]->next.bracket, mask, inside);
      find.counts.above += counts.above, find.counts.inside += counts.inside;
      if (collects[q] && counts.inside) append(find.candidates, key, inside, size, at);
    }
  };
  const int64_t nonfinite = for_each_block(task, chunk, block);
  for (size_t q = 0; q < queries.size(); ++q)
    collected[q] += queries[q]->finds[c].candidates.size();
  return nonfinite;
}

// Counts of the keys in a bracket by their leading digits. Two copies take turns, so
// that equal neighbours don't wait for each other; the last bin takes all others.
struct Histogram {
  Bracket bracket;
  int shift = 0;
  int64_t bins = 0, above = 0;
  std::vector<int64_t> count;

  Histogram(Bracket b, int low_bits)
      : bracket(b), shift(low_bits), bins(((b.high - b.low) >> low_bits) + int64_t{1}) {
    count.resize(2 * (bins + 1));
  }

  void add(const uint32_t* key, int64_t size) {
    const uint32_t width = bracket.high - bracket.low, none = bins;
    int64_t* const copies[] = {count.data(), count.data() + bins + 1};
    for (int64_t j = 0; j < size; ++j) {
      const uint32_t distance = key[j] - bracket.low;
      above += key[j] > bracket.high;
      ++copies[j & 1][distance <= width ? distance >> shift : none];
    }
  }

  void add(const Histogram& other) {
    above += other.above;
    for (size_t i = 0; i < count.size(); ++i) count[i] += other.count[i];
  }

  int64_t at(int64_t bin) const { return count[bin] + count[bins + 1 + bin]; }
};

// Fills all histograms in one pass over the scores.
inline void fill(const Task& task, std::vector<Histogram>& histograms) {
  std::mutex mutex;
  std::atomic<int64_t> next{0};
  const int64_t count = task.chunks.size();
  const std::vector<Histogram> empty = histograms;
  task.parallel(count, [&](int64_t, int64_t) {
    std::vector<Histogram> mine = empty;
    for (int64_t c; (c = next.fetch_add(1)) < count;)
      for_each_block(task, task.chunks[c],
                     [&](const uint32_t* key, int64_t size, int64_t) {
                       for (Histogram& h : mine) h.add(key, size);
                     });
    const std::lock_guard<std::mutex> lock(mutex);
    for (size_t i = 0; i < mine.size(); ++i) histograms[i].add(mine[i]);
  });
}

// Takes in how many entries lie above and in the proposed bracket; true where the k-th
// largest is in it.
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

inline Queries those(std::vector<Query>& queries, bool (Query::*state)() const) {
  Queries found;
  for (Query& q : queries)
    if ((q.*state)()) found.push_back(&q);
  return found;
}

// Divides a bracket into at most kBins equal parts.
inline Histogram narrowing(Bracket b) {
  int shift = 0;
  while ((b.high - b.low) >> shift >= kBins) ++shift;
  return Histogram(b, shift);
}

inline void count_pass(const Task& task, const Queries& queries) {
  std::vector<Histogram> histograms;
  for (const Query* q : queries) histograms.push_back(narrowing(q->next.bracket));
  fill(task, histograms);
  for (size_t i = 0; i < queries.size(); ++i) learn(*queries[i], histograms[i]);
}

// Returns the nonfinite entries of each chunk.
inline std::vector<int64_t> collect_pass(const Task& task, const Queries& queries) {
  std::vector<int64_t> nonfinite(task.chunks.size());
  std::vector<std::atomic<int64_t>> collected(queries.size());
  for (auto& c : collected) c = 0;
  for (Query* q : queries) q->finds.resize(task.chunks.size());
  for_each(task.parallel, task.chunks.size(), [&](int64_t c) {
    nonfinite[c] = collect_chunk(task, c, queries, collected.data());
  });
  for (size_t i = 0; i < queries.size(); ++i) {
    Query& q = *queries[i];
    Counts counts;
    for (const Find& f : q.finds)
      counts.above += f.counts.above, counts.inside += f.counts.inside;
    const bool complete = q.next.bracket.single() || collected[i] == counts.inside;
    q.done = q.fixed || (learn(q, counts) && complete);
    q.known.misses += !q.done && !complete;
  }
  return nonfinite;
}

// Narrows what is known by a histogram of the candidates; returns the keys that remain.
inline std::vector<uint32_t> narrow(Query& q) {
  std::vector<uint32_t> keys;
  keys.reserve(q.known.inside);
  for (const Find& f : q.finds)
    for (const Candidate& c : f.candidates) keys.push_back(c.key);
  Histogram histogram = narrowing(q.known.bracket);
  histogram.above = q.known.above;
  histogram.add(keys.data(), keys.size());
  learn(q, histogram);
  const Bracket b = q.known.bracket;
  const auto outside = [b](uint32_t key) { return key < b.low || key > b.high; };
  keys.erase(std::remove_if(keys.begin(), keys.end(), outside), keys.end());
  return keys;
}

// The threshold of a done query, and how many ties each chunk has.
inline void find_threshold(Query& q) {
  q.threshold = q.next.bracket.low;
  for (Find& f : q.finds) f.ties = f.counts.inside;
  if (q.next.bracket.single()) return;
  std::vector<uint32_t> keys = narrow(q);
  const auto kth = keys.begin() + (q.keep - q.known.above - 1);
  std::nth_element(keys.begin(), kth, keys.end(), std::greater<uint32_t>());
  q.threshold = *kth;
  q.known.above +=
      std::count_if(keys.begin(), kth, [&](uint32_t key) { return key > q.threshold; });
  for (Find& f : q.finds)
    f.ties = std::count_if(f.candidates.begin(), f.candidates.end(),
                           [&](Candidate c) { return c.key == q.threshold; });
}

// Leaves each chunk, in order, as many of its ties as are to be kept. `left` holds how
// many in each tensor, or one number for all.
inline void share_ties(const Task& task, Query& q, std::vector<int64_t> left) {
  for (size_t c = 0; c < q.finds.size(); ++c) {
    int64_t& some = left[left.size() == 1 ? 0 : task.chunks[c].tensor];
    q.finds[c].ties = std::min(q.finds[c].ties, some);
    some -= q.finds[c].ties;
  }
}

// Keeps ties of a threshold that is alone in its bracket.
inline void keep_ties(const Task& task, const Chunk& chunk, const Find& find,
                      uint32_t threshold, uint8_t* mask) {
  int64_t left = find.ties;
  if (left == 0) return;
  for_each_block(task, chunk, [&](const uint32_t* key, int64_t size, int64_t at) {
    if (find.ties == find.counts.inside)
      return block_loops().at_least(key, size, threshold, mask + at);
    for (int64_t j = 0; j < size && left > 0; ++j)
      if (key[j] == threshold) mask[at + j] = 1, --left;
  });
}

// Puts the masks right inside the bracket.
inline void finish_chunk(const Task& task, int64_t c, Query& q) {
  const Chunk& chunk = task.chunks[c];
  Find& find = q.finds[c];
  uint8_t* mask = q.masks[chunk.tensor] + chunk.first;
  if (q.next.bracket.single()) return keep_ties(task, chunk, find, q.threshold, mask);
  int64_t left = find.ties;
  for (const Candidate& x : find.candidates)
    mask[x.at] = x.key > q.threshold || (x.key == q.threshold && left-- > 0);
}

// Masks a fixed query, with `ties[i]` of the entries of tensor i that equal it.
inline void mask_at(const Task& task, Query query, std::vector<int64_t> ties) {
  collect_pass(task, {&query});
  for (Find& f : query.finds) f.ties = f.counts.inside;
  share_ties(task, query, std::move(ties));
  for_each(task.parallel, task.chunks.size(),
           [&](int64_t c) { finish_chunk(task, c, query); });
}

// Answers all queries, whatever the sample says; returns the nonfinite entries of each
// tensor.
inline std::vector<int64_t> select(const Task& task, std::vector<Query>& queries,
                                   const Sample& sample) {
  std::vector<int64_t> nonfinite;
  for (Query& q : queries) q.known.inside = task.total;
  do {
    for (Query& q : queries)
      if (!q.done && !q.fixed)
        q.next = propose(sample, q.known, q.keep, task.most_candidates());
    const Queries crowded = those(queries, &Query::counts);
    if (!crowded.empty()) count_pass(task, crowded);
    const Queries ready = those(queries, &Query::collects);
    if (!ready.empty() || queries.empty()) nonfinite = collect_pass(task, ready);
  } while (std::any_of(queries.begin(), queries.end(),
                       [](const Query& q) { return !q.done; }));
  for_each(task.parallel, queries.size(), [&](int64_t i) {
    if (!queries[i].fixed) find_threshold(queries[i]);
  });
  for (Query& q : queries)
    if (!q.fixed) share_ties(task, q, {q.keep - q.known.above});
  for_each(task.parallel, task.chunks.size(), [&](int64_t c) {
    for (Query& q : queries) finish_chunk(task, c, q);
  });
  std::vector<int64_t> of_tensor(task.scores.size());
  for (size_t c = 0; c < task.chunks.size(); ++c)
    of_tensor[task.chunks[c].tensor] += nonfinite[c];
  return of_tensor;
}

inline std::vector<int64_t> select(const Task& task, std::vector<Query>& queries) {
  return select(task, queries, draw_sample(task.scores, task.parallel));
}

}  // namespace topk
}  // namespace fisherprune
