// global_topk on the CPU, free of torch.
//
// A sorted sample brackets the k-th largest key so narrowly that about one entry in a
// hundred lies inside. One pass over the scores writes the masks of all that is above
// the bracket, and collects the entries inside; the k-th largest of those is the
// threshold, and their words of the masks are put right. So the scores are read once
// and the masks written once. A bracket that missed is moved, one that is too crowded
// to collect is narrowed by a histogram, until the k-th largest is among the collected,
// or alone in its bracket: then only the chunks that keep ties are read once more.
//
// Threads take chunks of fixed size; ties are shared out over chunks in order, so
// nothing depends on the number of threads.
#pragma once

#include "global_topk_histogram.h"

namespace fisherprune {
namespace topk {

// Writes the masks of all above the bracket in a block, appends what is inside where it
// is to be collected.
inline Counts split(const Block& block, const Query& q, bool collects, uint8_t* mask,
                    Candidates& candidates) {
  Word* const words = candidates.words.room(kBlock / 64);
  uint32_t* const keys = candidates.keys.room(kBlock + kBeyond);
  const Bracket bracket = q.next.bracket;
  const BlockCounts counts = block_loops().split(block, bracket, mask, words, keys);
  if (collects)
    candidates.words.append(counts.words), candidates.keys.append(counts.inside);
  else
    block_loops().settle(words, counts.words, keys, bracket.high, 0,
                         block.at + block.size, mask);
  return {counts.above, counts.inside};
}

// A pass over the scores that collects the candidates of some queries.
struct Collection {
  const Task& task;
  const Queries& queries;
  std::vector<std::atomic<int64_t>> collected;  // candidates of each query

  Collection(const Task& t, const Queries& q)
      : task(t), queries(q), collected(q.size()) {
    for (auto& c : collected) c = 0;
  }

  // Writes the masks of all above the brackets, collects what is inside, while there is
  // room; returns the chunk's nonfinite entries.
  int64_t chunk(int64_t c, const std::vector<Candidates*>& candidates) {
    const Chunk& chunk = task.chunks[c];
    std::vector<bool> collects(queries.size());
    std::vector<Find> finds(queries.size());  // other threads write beside the queries'
    for (size_t q = 0; q < queries.size(); ++q) {
      collects[q] = !queries[q]->next.bracket.single() &&
                    collected[q].load() <= task.most_candidates();
      finds[q].in = candidates[q];
      finds[q].first_word = candidates[q]->words.size();
      finds[q].first_key = candidates[q]->keys.size();
    }
    const int64_t nonfinite = for_each_block(task, chunk, [&](const Block& block) {
      for (size_t q = 0; q < queries.size(); ++q) {
        block.prefetch(q, queries.size());
        uint8_t* const mask = queries[q]->masks[chunk.tensor] + chunk.first;
        const Counts counts =
            split(block, *queries[q], collects[q], mask, *candidates[q]);
        finds[q].counts.above += counts.above;
        finds[q].counts.inside += counts.inside;
      }
    });
    for (size_t q = 0; q < queries.size(); ++q) {
      finds[q].words = candidates[q]->words.size() - finds[q].first_word;
      finds[q].keys = candidates[q]->keys.size() - finds[q].first_key;
      collected[q] += finds[q].keys;
      queries[q]->finds[c] = finds[q];
    }
    return nonfinite;
  }
};

// Returns the nonfinite entries of each chunk.
inline std::vector<int64_t> collect_pass(const Task& task, const Queries& queries) {
  Collection collection(task, queries);
  std::vector<int64_t> nonfinite(task.chunks.size());
  for (Query* q : queries) {
    q->finds.assign(task.chunks.size(), Find());
    q->candidates.clear();
  }
  std::mutex mutex;
  const auto own = [&] {
    const std::lock_guard<std::mutex> lock(mutex);
    std::vector<Candidates*> candidates;
    for (Query* q : queries)
      candidates.push_back(
          q->candidates.emplace_back(std::make_unique<Candidates>()).get());
    return candidates;
  };
  for_each_with(task.parallel, task.chunks.size(), own,
                [&](int64_t c, const std::vector<Candidates*>& candidates) {
                  nonfinite[c] = collection.chunk(c, candidates);
                });
  for (size_t i = 0; i < queries.size(); ++i) {
    Query& q = *queries[i];
    Counts counts;
    for (const Find& f : q.finds)
      counts.above += f.counts.above, counts.inside += f.counts.inside;
    const bool complete =
        q.next.bracket.single() || collection.collected[i] == counts.inside;
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
    for (const uint32_t key : f) histogram.add(key);
  learn(q, histogram);
  const Bracket b = q.known.bracket;
  std::vector<Finalist> finalists;
  for (size_t c = 0; c < q.finds.size(); ++c)
    for (const uint32_t key : q.finds[c])
      if (key - b.low <= b.high - b.low) finalists.push_back({key, c});
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
  for_each_block(task, chunk, [&](const Block& block) {
    block.prefetch(0, 1);
    uint8_t* const own = mask + block.at;
    if (find.ties == find.counts.inside)
      return block_loops().at_least(block.key, block.size, threshold, own);
    for (int64_t j = 0; j < block.size && left > 0; ++j)
      if (block.key[j] == threshold) own[j] = 1, --left;
  });
}

// Puts the masks right inside the bracket.
inline void finish_chunk(const Task& task, int64_t c, Query& q) {
  const Chunk& chunk = task.chunks[c];
  Find& find = q.finds[c];
  uint8_t* mask = q.masks[chunk.tensor] + chunk.first;
  if (q.next.bracket.single()) return keep_ties(task, chunk, find, q.threshold, mask);
  block_loops().settle(find.in->words.at(find.first_word), find.words, find.begin(),
                       q.threshold, find.ties, chunk.size, mask);
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
    for_each(task.parallel, queries.size(), [&](int64_t i) {
      Query& q = queries[i];
      if (!q.done && !q.fixed)
        q.next = propose(sample, q.known, q.keep, task.most_candidates());
    });
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
