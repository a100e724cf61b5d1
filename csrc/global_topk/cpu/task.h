// What the passes of the CPU's global_topk work on: chunks of the scores, and queries.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "global_topk/cpu/sample.h"
#include "global_topk/cpu/x86.h"

namespace fisherprune::cpu::global_topk {

// A piece of one tensor, the unit of work.
struct Chunk {
  int64_t tensor, first, size;
};

// Values appended one after the other, without a constructor.
template <class T>
class Buffer {
 public:
  // Where the next values go: at most `count`.
  T* room(int64_t count) {
    if (size_ + count > capacity_) {
      capacity_ = 2 * capacity_ + count;
      void* const larger = std::realloc(data_.get(), capacity_ * sizeof(T));
      if (larger == nullptr) throw std::bad_alloc();
      static_cast<void>(data_.release());
      data_.reset(static_cast<T*>(larger));
    }
    return data_.get() + size_;
  }
  void append(int64_t count) { size_ += count; }

  int64_t size() const { return size_; }
  const T* at(int64_t i) const { return data_.get() + i; }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t size_ = 0, capacity_ = 0;
};

// The entries in the bracket that one thread found: their places in their chunks, and
// their keys.
struct Candidates {
  Buffer<uint16_t> places;
  Buffer<uint32_t> keys;
};

// What one chunk holds for one query.
struct Find {
  Counts counts;
  const Candidates* in = nullptr;
  int64_t first = 0, count = 0;  // of the candidates
  int64_t ties = 0;              // entries equal to the threshold that are kept

  const uint16_t* places() const { return in->places.at(first); }
  const uint32_t* begin() const { return in->keys.at(first); }
  const uint32_t* end() const { return begin() + count; }
};

// The masks of the `keep` largest entries, or no masks, and the state of the search for
// their threshold.
struct Query {
  Query(int64_t k, std::vector<uint8_t*> bytes) : keep(k), masks(std::move(bytes)) {}

  int64_t keep;
  std::vector<uint8_t*> masks;  // one per tensor; none for the threshold alone
  bool fixed = false;           // the threshold is given: there is no search
  bool done = false;
  Known known;
  Proposal next{};
  std::vector<Find> finds;                              // one per chunk
  std::vector<std::unique_ptr<Candidates>> candidates;  // one per thread
  uint32_t threshold = 0;

  // Null where the query has no masks.
  uint8_t* mask_of(const Chunk& chunk) const {
    return masks.empty() ? nullptr : masks[chunk.tensor] + chunk.first;
  }
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

// Calls work(i) once for each i in [0, count). In the end all threads see what the work
// wrote, past the caches too.
template <class Work>
void for_each(const Parallel& parallel, int64_t count, const Work& work) {
  for_each_task(
      parallel, count, [] { return 0; }, [&](int64_t i, int) { work(i); },
      [](int) { block_loops().publish(); });
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
      for (int64_t at = 0; at < scores[i].size; at += tuning::kChunk)
        chunks.push_back({static_cast<int64_t>(i), at,
                          std::min(tuning::kChunk, scores[i].size - at)});
    }
  }

  // The most entries that a query collects: with more a histogram takes less time, and
  // much less memory.
  int64_t most_candidates() const {
    return std::max<int64_t>(total / 16, 2 * tuning::kSampleFrom);
  }
};

// Calls work(block) for each block.
template <class Work>
void for_each_block(const Task& task, const Chunk& chunk, const Work& work) {
  Block block;
  const float* data = task.scores[chunk.tensor].data + chunk.first;
  for (block.at = 0; block.at < chunk.size; block.at += tuning::kBlock) {
    block.scores = data + block.at;
    block.size = std::min(tuning::kBlock, chunk.size - block.at);
    block.next_size = std::min(tuning::kBlock, chunk.size - block.at - block.size);
    work(block);
  }
}

using Queries = std::vector<Query*>;

inline Queries those(std::vector<Query>& queries, bool (Query::*state)() const) {
  Queries found;
  for (Query& q : queries)
    if ((q.*state)()) found.push_back(&q);
  return found;
}

}  // namespace fisherprune::cpu::global_topk
