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

#include "global_topk_histogram.h"

namespace fisherprune {
namespace topk {

// A thread's candidates of one chunk and query, with room for a whole block.
class Collected {
 public:
  void clear() { count_ = 0; }

  // Appends the entries whose bit in `inside` is set. Few are: the words that hold any
  // are listed first, and of each four are taken whether or not there are as many, so
  // that hardly a branch is mispredicted.
  void append(const uint32_t* key, const uint64_t* inside, int64_t size, int64_t at) {
    if (static_cast<int64_t>(found_.size()) < count_ + kBlock + kAtOnce)
      found_.resize(2 * found_.size() + 2 * kBlock);
    int32_t words[kBlock / 64];
    int64_t word_count = 0;
    for (int32_t w = 0; w < (size + 63) / 64; ++w) {
      words[word_count] = w;
      word_count += inside[w] != 0;
    }
    for (int64_t i = 0; i < word_count; ++i) {
      const int64_t first = 64 * words[i];
      uint64_t word = inside[words[i]];
      do {
        for (int j = 0; j < kAtOnce; ++j, word &= word - 1) {
          const int64_t place = first + (word ? __builtin_ctzll(word) : 0);
          found_[count_] = {key[place], static_cast<int32_t>(at + place)};
          count_ += word != 0;
        }
      } while (word);
    }
  }

  std::vector<Candidate> all() const {
    return {found_.begin(), found_.begin() + count_};
  }

 private:
  static constexpr int kAtOnce = 4;
  std::vector<Candidate> found_;
  int64_t count_ = 0;
};

// Writes the masks of all above the brackets, collects what is inside, while there is
// room; returns the chunk's nonfinite entries.
inline int64_t collect_chunk(const Task& task, int64_t c, const Queries& queries,
                             std::atomic<int64_t>* collected,
                             std::vector<Collected>& candidates) {
  const Chunk& chunk = task.chunks[c];
  std::vector<bool> collects(queries.size());
  for (size_t q = 0; q < queries.size(); ++q) {
    queries[q]->finds[c] = Find();
    candidates[q].clear();
    collects[q] = !queries[q]->next.bracket.single() &&
                  collected[q].load() <= task.most_candidates();
  }
  const auto block = [&](const uint32_t* key, int64_t size, int64_t at) {
    uint64_t inside[kBlock / 64];
    for (size_t q = 0; q < queries.size(); ++q) {
      Find& find = queries[q]->finds[c];
      uint8_t* mask = queries[q]->masks[chunk.tensor] + chunk.first + at;
      const BlockCounts counts =
          block_loops().split(key, size, queries[q]->next.bracket, mask, inside);
      find.counts.above += counts.above, find.counts.inside += counts.inside;
      if (collects[q] && counts.inside) candidates[q].append(key, inside, size, at);
    }
  };
  const int64_t nonfinite = for_each_block(task, chunk, block);
  block_loops().publish();
  for (size_t q = 0; q < queries.size(); ++q) {
    queries[q]->finds[c].candidates = candidates[q].all();
    collected[q] += queries[q]->finds[c].candidates.size();
  }
  return nonfinite;
}

// Returns the nonfinite entries of each chunk.
inline std::vector<int64_t> collect_pass(const Task& task, const Queries& queries) {
  std::vector<int64_t> nonfinite(task.chunks.size());
  std::vector<std::atomic<int64_t>> collected(queries.size());
  for (auto& c : collected) c = 0;
  for (Query* q : queries) q->finds.resize(task.chunks.size());
  for_each_with(
      task.parallel, task.chunks.size(),
      [&] { return std::vector<Collected>(queries.size()); },
      [&](int64_t c, std::vector<Collected>& candidates) {
        nonfinite[c] = collect_chunk(task, c, queries, collected.data(), candidates);
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

// The candidates in what is known after a histogram of them all, and their chunks.
struct Finalist {
  uint32_t key;
  size_t chunk;
};

inline std::vector<Finalist> narrow(Query& q) {
  Histogram histogram = narrowing(q.known.bracket);
  histogram.above = q.known.above;
  for (const Find& f : q.finds)
    for (const Candidate& x : f.candidates) histogram.add(x.key);
  learn(q, histogram);
  const Bracket b = q.known.bracket;
  std::vector<Finalist> finalists;
  for (size_t c = 0; c < q.finds.size(); ++c)
    for (const Candidate& x : q.finds[c].candidates)
      if (x.key - b.low <= b.high - b.low) finalists.push_back({x.key, c});
  return finalists;
}

// The threshold of a done query, and how many ties each chunk has.
inline void find_threshold(Query& q) {
  q.threshold = q.next.bracket.low;
  for (Find& f : q.finds) f.ties = q.next.bracket.single() ? f.counts.inside : 0;
  if (q.next.bracket.single()) return;
  std::vector<Finalist> finalists = narrow(q);
  const auto larger = [](Finalist a, Finalist b) { return a.key > b.key; };
  const auto kth = finalists.begin() + (q.keep - q.known.above - 1);
  std::nth_element(finalists.begin(), kth, finalists.end(), larger);
  q.threshold = kth->key;
  for (const Finalist& x : finalists) {
    q.known.above += x.key > q.threshold;
    q.finds[x.chunk].ties += x.key == q.threshold;
  }
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
  return select(task, queries, draw_sample(task.scores, queries.size(), task.parallel));
}

}  // namespace topk
}  // namespace fisherprune
