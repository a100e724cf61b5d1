// What the passes of the CPU's global_topk work on: chunks of the scores, and queries.
#pragma once

#include "global_topk_sample.h"

namespace fisherprune {
namespace topk {

constexpr int64_t kChunk = 32 * kBlock;

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

  // The most entries that are worth collecting for a query: the memory is half of the
  // scores'.
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

using Queries = std::vector<Query*>;

inline Queries those(std::vector<Query>& queries, bool (Query::*state)() const) {
  Queries found;
  for (Query& q : queries)
    if ((q.*state)()) found.push_back(&q);
  return found;
}

}  // namespace topk
}  // namespace fisherprune
