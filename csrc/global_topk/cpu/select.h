// global_topk on the CPU, free of torch.
//
// A sorted sample gives a bracket around the k-th largest key, so narrow that about one
// entry in a hundred lies inside. One pass over the scores writes the masks of all
// entries above the bracket, and collects the entries inside. The threshold is found
// among the collected entries, and the masks of those above it are set. So the scores
// are read once and the masks are written once. Several queries share the pass and most
// of its work: the keys become bytes once, and each query compares bytes. A bracket
// that misses the k-th largest key is moved. One that holds too many entries to collect
// is narrowed by a histogram. This goes on until the k-th largest key is among the
// collected ones, or alone in its bracket: then only the chunks that keep ties are read
// again.
//
// Threads take chunks of a fixed size, and ties are given to the chunks in order:
// nothing depends on the number of threads.
#pragma once

#include <atomic>
#include <mutex>

#include "global_topk/cpu/coding.h"
#include "global_topk/cpu/histogram.h"

namespace fisherprune::cpu::global_topk {

// Appends the candidates of a block and returns how many there are. Mostly a word has
// one or two: these are taken without a branch, which would be mispredicted.
inline int64_t append(const Block& block, const Inside& inside,
                      Candidates& candidates) {
  uint16_t* place = candidates.places.room(tuning::kBlock + 1);
  uint32_t* key = candidates.keys.room(tuning::kBlock + 1);
  const uint32_t* const first = key;
  const auto put = [&](int i, int64_t j) {
    place[i] = static_cast<uint16_t>(block.at + j);
    key[i] = key_of(block.scores[j]);
  };
  for (int64_t w = 0; w < inside.count; ++w) {
    const int64_t at = int64_t{64} * inside.listed[w];
    uint64_t bits = inside.word[inside.listed[w]];
    const uint64_t others = bits & (bits - 1);
    int count = 1 + (others != 0);
    put(0, at + __builtin_ctzll(bits));
    put(1, at + 63 - __builtin_clzll(bits));
    if (others & (others - 1))
      for (count = 0; bits; bits &= bits - 1) put(count++, at + __builtin_ctzll(bits));
    place += count, key += count;
  }
  candidates.places.append(key - first), candidates.keys.append(key - first);
  return key - first;
}

inline int64_t count_of(const Inside& inside) {
  int64_t count = 0;
  for (int64_t w = 0; w < inside.count; ++w)
    count += __builtin_popcountll(inside.word[inside.listed[w]]);
  return count;
}

// One query in one chunk; its mask is null where it has none.
struct Share {
  Candidates& candidates;
  bool collects;
  uint8_t* mask;
  Find find;

  // Writes the mask of what is above the range in a block, and counts what is inside,
  // or collects it, too.
  void take(const Block& block, CodeRange range) {
    Inside inside;
    uint8_t* const own = mask ? mask + block.at : nullptr;
    find.counts.above += block_loops().split(block, range, own, inside);
    find.counts.inside +=
        collects ? append(block, inside, candidates) : count_of(inside);
  }
};

// A pass over the scores that collects the candidates of some queries.
struct Collection {
  const Task& task;
  const std::vector<CodedQueries>& coded;
  const Queries queries;                        // one coding's after the other's
  std::vector<std::atomic<int64_t>> collected;  // candidates of each query

  Collection(const Task& t, const std::vector<CodedQueries>& c)
      : task(t), coded(c), queries(queries_of(c)), collected(queries.size()) {
    for (auto& count : collected) count = 0;
  }

  // Whether a query collects its candidates: as long as there is room for them.
  bool collects(size_t q) const {
    return !queries[q]->next.bracket.single() &&
           collected[q].load() <= task.most_candidates();
  }

  // Splits a chunk for all queries; returns how many of its entries are not finite.
  int64_t chunk(int64_t c, const std::vector<Candidates*>& candidates) {
    const Chunk& chunk = task.chunks[c];
    std::vector<Share> shares;  // other threads write beside the queries' own finds
    for (size_t q = 0; q < queries.size(); ++q) {
      shares.push_back(
          {*candidates[q], collects(q), queries[q]->mask_of(chunk), Find()});
      shares[q].find.in = candidates[q];
      shares[q].find.first = candidates[q]->keys.size();
    }
    int64_t nonfinite = 0;
    for_each_block(task, chunk, [&](Block& block) {
      size_t q = 0;
      for (const CodedQueries& some : coded) {
        const int64_t bad = block_loops().encode(block, some.coding);
        if (&some == coded.data()) nonfinite += bad;
        for (const Query* query : some.queries) {
          block.prefetch(q, queries.size());
          shares[q++].take(block, codes_of(some.coding, query->next.bracket));
        }
      }
    });
    for (size_t q = 0; q < queries.size(); ++q) {
      if (shares[q].collects) shares[q].find.count = shares[q].find.counts.inside;
      collected[q] += shares[q].find.count;
      queries[q]->finds[c] = shares[q].find;
    }
    return nonfinite;
  }
};

// Returns how many entries of each chunk are not finite.
inline std::vector<int64_t> collect_pass(const Task& task,
                                         const std::vector<CodedQueries>& coded) {
  Collection collection(task, coded);
  std::vector<int64_t> nonfinite(task.chunks.size());
  for (Query* q : collection.queries) {
    q->finds.assign(task.chunks.size(), Find());
    q->candidates.clear();
  }
  std::mutex mutex;
  const auto own = [&] {
    const std::lock_guard<std::mutex> lock(mutex);
    std::vector<Candidates*> candidates;
    for (Query* q : collection.queries)
      candidates.push_back(
          q->candidates.emplace_back(std::make_unique<Candidates>()).get());
    return candidates;
  };
  for_each_task(
      task.parallel, task.chunks.size(), own,
      [&](int64_t c, const std::vector<Candidates*>& candidates) {
        nonfinite[c] = collection.chunk(c, candidates);
      },
      [](const std::vector<Candidates*>&) { block_loops().publish(); });
  for (size_t i = 0; i < collection.queries.size(); ++i) {
    Query& q = *collection.queries[i];
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

// A candidate that is left in the bracket after a histogram of all candidates.
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

// Leaves each chunk, in order, the number of its ties that are kept. `left` is how many
// are kept in each tensor, or one number for all tensors.
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
  const Coding coding = coding_for({threshold, threshold});
  const uint8_t code = code_of(coding, threshold);
  for_each_block(task, chunk, [&](Block& block) {
    block.prefetch(0, 1);
    block_loops().encode(block, coding);
    uint8_t* const own = mask + block.at;
    Inside rest;
    if (find.ties == find.counts.inside)
      block_loops().split(block, {0, static_cast<uint8_t>(code - 1)}, own, rest);
    else
      for (int64_t j = 0; j < block.size && left > 0; ++j)
        if (block.code[j] == code) own[j] = 1, --left;
  });
}

// Masks the candidates above the threshold, and the first ties. Nearly each of them
// lies in a cache line of its own: many lines are asked for before the first is
// written.
inline void settle(const Find& find, uint32_t threshold, uint8_t* mask) {
  uint16_t kept[tuning::kTogether];
  int64_t left = find.ties;
  for (int64_t i = 0; i < find.count; i += tuning::kTogether) {
    const int64_t size = std::min(tuning::kTogether, find.count - i);
    const uint16_t* const place = find.places() + i;
    const uint32_t* const key = find.begin() + i;
    int64_t count = 0;
    for (int64_t j = 0; j < size; ++j) {
      kept[count] = place[j];
      const bool tie = key[j] == threshold && left > 0;
      left -= tie;
      count += key[j] > threshold || tie;
    }
    for (int64_t j = 0; j < count; ++j) __builtin_prefetch(mask + kept[j], 1);
    for (int64_t j = 0; j < count; ++j) mask[kept[j]] = 1;
  }
}

// Completes the masks inside the bracket, where there are masks.
inline void finish_chunk(const Task& task, int64_t c, Query& q) {
  const Chunk& chunk = task.chunks[c];
  uint8_t* const mask = q.mask_of(chunk);
  if (mask == nullptr) return;
  if (q.next.bracket.single())
    keep_ties(task, chunk, q.finds[c], q.threshold, mask);
  else
    settle(q.finds[c], q.threshold, mask);
}

// Masks a fixed query, with `ties[i]` of the entries of tensor i that equal it.
inline void mask_at(const Task& task, Query query, std::vector<int64_t> ties) {
  collect_pass(task, {{coding_for(query.next.bracket), {&query}}});
  for (Find& f : query.finds) f.ties = f.counts.inside;
  share_ties(task, query, std::move(ties));
  for_each(task.parallel, task.chunks.size(),
           [&](int64_t c) { finish_chunk(task, c, query); });
}

// Answers all queries; the sample decides on the time alone. Returns how many entries
// of each tensor are not finite.
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
    if (!ready.empty() || queries.empty())
      nonfinite = collect_pass(task, share_codings(sample, ready));
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

}  // namespace fisherprune::cpu::global_topk
