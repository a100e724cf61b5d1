// The top-k ops: from their contracts to launches. Free of torch, so that tests can run
// it unchanged.
#pragma once

#include <algorithm>
#include <vector>

#include "common/check.h"
#include "common/integers.h"
#include "global_topk/cuda/masks.cuh"

namespace fisherprune::cuda::global_topk {

inline int64_t chunks_of(int64_t size) { return ceil_div(size, TOPK_CHUNK); }

inline int64_t chunks_of(const std::vector<Scores>& scores) {
  int64_t chunks = 0;
  for (const Scores& s : scores) chunks += chunks_of(s.size);
  return chunks;
}

// The device memory of up to TOPK_KEEPS selections that share their passes, the first
// `masked` of them with masks: where each part begins, in words. The first launch fills
// it with zeros up to `entries`, and stores the host's tables behind them. There is a
// cut for each selection with masks, or for each tensor. Bins take 16 KiB and 32 KiB
// for each selection; ties take 256 bytes for each one with masks and 2^20 scores.
struct TopkWorkspace {
  int64_t masked, bins, tickets, entries, selections, masks, cuts, ties, words;

  static constexpr int64_t TICKETS = 4;  // three histograms and the ties

  TopkWorkspace(const std::vector<Scores>& scores, int64_t n, int64_t masked_,
                int64_t bins_) {
    const int64_t tensors = static_cast<int64_t>(scores.size());
    masked = masked_;
    bins = 0;
    tickets = bins + bins_;
    entries = tickets + TICKETS;
    selections = entries + tensors * sizeof(ScoreEntry) / sizeof(int64_t);
    masks = selections + n * sizeof(Selection) / sizeof(int64_t);
    cuts = masks + masked * tensors;
    ties = cuts + std::max(masked, tensors) * sizeof(Cut) / sizeof(int64_t);
    words = ties + ceil_div(masked * chunks_of(scores), 4);
  }
};

template <class Value>
void append(std::vector<uint64_t>& words, const std::vector<Value>& values) {
  static_assert(sizeof(Value) % sizeof(uint64_t) == 0);
  const size_t at = words.size();
  words.resize(at + values.size() * (sizeof(Value) / sizeof(uint64_t)));
  if (!values.empty())
    memcpy(words.data() + at, values.data(), values.size() * sizeof(Value));
}

// Stores the words, in as many launches as it takes. The first one fills `a` and `b`
// with zeros, too.
inline void upload(const std::vector<uint64_t>& words, int64_t* to, Stream stream,
                   Zeros a = {nullptr, 0}, Zeros b = {nullptr, 0}) {
  constexpr int threads = 256, blocks = 32;
  for (size_t at = 0; at == 0 || at < words.size(); at += Words::capacity) {
    Words part{};
    part.count = static_cast<int>(std::min<size_t>(words.size() - at, Words::capacity));
    std::copy_n(words.data() + at, part.count, part.word);
    launch(store_words, dim3(a.count + b.count > threads ? blocks : 1), threads, 0,
           stream, part, reinterpret_cast<uint64_t*>(to + at), a, b);
    a.count = b.count = 0;
  }
}

// The kernels' view of a call: pointers into its workspace, which the constructor
// fills.
struct TopkCall {
  ScoreTable table;
  unsigned long long *bins, *tickets;
  Selection* selections;
  int64_t* masks;
  Cut* cuts;
  uint16_t* ties;
  int n, masked;
  unsigned grid;
  Stream stream;

  // `zeros` are filled too, beside the bins.
  TopkCall(const std::vector<Scores>& scores, const std::vector<int64_t>* ties_kept,
           const std::vector<Selection>& wanted, Zeros zeros, int64_t* memory,
           const TopkWorkspace& at, int multiprocessors, Stream on)
      : n(static_cast<int>(wanted.size())),
        masked(static_cast<int>(at.masked)),
        stream(on) {
    const std::vector<ScoreEntry> entries = entries_of(scores, ties_kept);
    std::vector<uint64_t> words;  // in the workspace's order
    append(words, entries);
    append(words, wanted);
    upload(words, memory + at.entries, stream, {memory, at.entries}, zeros);
    table = {reinterpret_cast<const ScoreEntry*>(memory + at.entries),
             static_cast<int64_t>(entries.size()), chunks_of(scores)};
    bins = reinterpret_cast<unsigned long long*>(memory + at.bins);
    tickets = reinterpret_cast<unsigned long long*>(memory + at.tickets);
    selections = reinterpret_cast<Selection*>(memory + at.selections);
    masks = memory + at.masks;
    cuts = reinterpret_cast<Cut*>(memory + at.cuts);
    ties = reinterpret_cast<uint16_t*>(memory + at.ties);
    const int64_t resident = int64_t{TOPK_BLOCKS} * multiprocessors;
    grid = static_cast<unsigned>(std::clamp<int64_t>(table.chunks, 1, resident));
  }

  static std::vector<ScoreEntry> entries_of(const std::vector<Scores>& scores,
                                            const std::vector<int64_t>* ties_kept) {
    std::vector<ScoreEntry> entries;
    int64_t chunks = 0;
    for (size_t i = 0; i < scores.size(); ++i) {
      entries.push_back(
          {scores[i].data, scores[i].size, chunks, ties_kept ? (*ties_kept)[i] : 0});
      chunks += chunks_of(scores[i].size);
    }
    return entries;
  }
};

inline void launch_histogram(const TopkCall& call, Digit digit, int n,
                             unsigned long long* totals, Nonfinite nonfinite,
                             Decision decision) {
  const auto kernel = digit.prefix_bits == 0 ? topk_histogram_kernel<true>
                                             : topk_histogram_kernel<false>;
  launch(
      kernel, dim3(call.grid), TOPK_THREADS,
      std::max(SEARCH_BYTES, static_cast<size_t>(n) * sizeof(uint32_t) << digit.bits),
      call.stream, call.table, call.selections, n, digit, totals, nonfinite, decision);
}

// Finds the thresholds, digit by digit; all selections have the first histogram in
// common. Without selections it only counts the scores that are not finite.
inline void find_thresholds(const TopkCall& call, unsigned long long* nonfinite,
                            float* thresholds) {
  const Decision decision{call.selections, call.n, 0, thresholds, call.tickets};
  if (call.n == 0)
    return launch_histogram(call, DIGITS[1], 0, nullptr, {nonfinite, nullptr},
                            decision);
  unsigned long long* bins = call.bins;
  for (const Digit& digit : DIGITS) {
    const int pass = static_cast<int>(&digit - DIGITS), n = pass == 0 ? 1 : call.n;
    Decision next = decision;
    next.stride = pass == 0 ? 0 : int64_t{1} << digit.bits;
    next.ticket = call.tickets + pass;
    launch_histogram(call, digit, n, bins, {pass == 1 ? nonfinite : nullptr, call.bins},
                     next);
    bins += n * MOST_BINS;
  }
}

inline TieRule rule_of(const TopkCall& call, bool per_tensor) {
  return {call.selections, call.masked, per_tensor};
}

inline void find_cuts(const TopkCall& call, bool per_tensor) {
  if (call.masked == 0) return;
  launch(topk_count_ties_kernel, dim3(call.grid), TOPK_THREADS, TIES_BYTES, call.stream,
         call.table, rule_of(call, per_tensor), call.ties, call.cuts, call.tickets + 3);
}

// `masks` holds the masks of all tensors for the first selection, then for the next.
inline void write_masks(const TopkCall& call, const std::vector<bool*>& masks,
                        bool per_tensor) {
  if (call.masked == 0) return;
  std::vector<uint64_t> words;
  append(words, masks);
  upload(words, call.masks, call.stream);
  launch(topk_mask_kernel, dim3(call.grid), TOPK_THREADS, SEARCH_BYTES, call.stream,
         call.table, rule_of(call, per_tensor), call.cuts,
         reinterpret_cast<bool* const*>(call.masks));
}

// ---- global_topk: up to TOPK_KEEPS selections a call ----

inline TopkWorkspace topk_workspace(const std::vector<Scores>& scores, int64_t n,
                                    int64_t masked) {
  return {scores, n, masked, (1 + 2 * n) * MOST_BINS};
}

// Does all but the masks: write_masks(..., false) must follow. The caller can allocate
// the masks, those of the first `masked` ranks, while the device works. `nonfinite` has
// a count for each tensor, or is null where an earlier call has counted.
inline TopkCall start_topk(const std::vector<Scores>& scores,
                           const std::vector<int64_t>& ranks, int64_t masked,
                           float* thresholds, int64_t* nonfinite, int64_t* memory,
                           int multiprocessors, Stream stream) {
  std::vector<Selection> wanted;
  for (const int64_t k : ranks) wanted.push_back({k, k, 0, 0});
  const Zeros zeros{nonfinite, nonfinite ? static_cast<int64_t>(scores.size()) : 0};
  const TopkCall call(scores, nullptr, wanted, zeros, memory,
                      topk_workspace(scores, ranks.size(), masked), multiprocessors,
                      stream);
  find_thresholds(call, reinterpret_cast<unsigned long long*>(nonfinite), thresholds);
  find_cuts(call, false);
  return call;
}

// ---- topk_histogram ----

inline TopkWorkspace histogram_workspace(const std::vector<Scores>& scores) {
  return {scores, 1, 0, 0};
}

inline void run_topk_histogram(const std::vector<Scores>& scores, uint64_t prefix,
                               Digit digit, int64_t* counts, int64_t* memory,
                               int multiprocessors, Stream stream) {
  const Selection selection{0, 0, 0, prefix << (32 - digit.prefix_bits)};
  const TopkCall call(scores, nullptr, {selection}, {counts, int64_t{1} << digit.bits},
                      memory, histogram_workspace(scores), multiprocessors, stream);
  const auto totals = reinterpret_cast<unsigned long long*>(counts);
  if (digit.bits > SHARED_DIGIT_BITS)
    launch(topk_long_histogram_kernel, dim3(call.grid), TOPK_THREADS, 0, stream,
           call.table, call.selections, digit, totals);
  else
    launch_histogram(call, digit, 1, totals, {}, {});
}

// ---- topk_masks ----

inline TopkWorkspace masks_workspace(const std::vector<Scores>& scores) {
  return {scores, 1, 1, 0};
}

inline void run_topk_masks(const std::vector<Scores>& scores, float threshold,
                           const std::vector<int64_t>& ties,
                           const std::vector<bool*>& masks, int64_t* memory,
                           int multiprocessors, Stream stream) {
  // Neither all ties nor none: `left` and `equal` differ.
  const Selection selection{1, 0, 1, key_of(threshold)};
  const TopkCall call(scores, &ties, {selection}, {}, memory, masks_workspace(scores),
                      multiprocessors, stream);
  find_cuts(call, true);
  write_masks(call, masks, true);
}

}  // namespace fisherprune::cuda::global_topk
