// The top-k ops from their contracts to launches. Free of torch, so that tests run it
// as it is.
//
// The workspace of one call begins with zeros where the histograms add; the tables that
// the host fills follow, then the ties of each chunk.
#pragma once

#include <algorithm>
#include <vector>

#include "../check.h"
#include "global_topk_kernel.cuh"

namespace fisherprune {

constexpr Digit DIGITS[] = {{0, 11}, {11, 11}, {22, 10}};
constexpr int64_t MOST_BINS = 1 << 11;

inline int64_t chunks_of(int64_t size) { return (size + TOPK_CHUNK - 1) / TOPK_CHUNK; }

inline int64_t chunks_of(const std::vector<Scores>& scores) {
  int64_t chunks = 0;
  for (const Scores& s : scores) chunks += chunks_of(s.size);
  return chunks;
}

// Device memory of up to TOPK_KEEPS selections that share their passes.
struct TopkWorkspace {
  int64_t bins, entries, selections, masks, ties, words;  // where each part begins

  TopkWorkspace(const std::vector<Scores>& scores, int64_t n, int64_t bins_) {
    const int64_t tensors = static_cast<int64_t>(scores.size());
    bins = 0;
    entries = bins + bins_;
    selections = entries + tensors * sizeof(ScoreEntry) / sizeof(int64_t);
    masks = selections + n * sizeof(Selection) / sizeof(int64_t);
    ties = masks + n * tensors;
    words = ties + n * (chunks_of(scores) + 1);
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

inline void upload(const std::vector<uint64_t>& words, int64_t* to, Stream stream) {
  for (size_t at = 0; at < words.size(); at += Words::capacity) {
    Words part{};
    part.count = static_cast<int>(std::min<size_t>(words.size() - at, Words::capacity));
    std::copy_n(words.data() + at, part.count, part.word);
    launch(store_words, dim3(1), 128, 0, stream, part,
           reinterpret_cast<uint64_t*>(to + at));
  }
}

// The kernels' view of a call: pointers into its zeroed workspace.
struct TopkCall {
  ScoreTable table;
  unsigned long long* bins;
  Selection* selections;
  bool** masks;
  int64_t* ties;
  int n;
  unsigned grid;
  Stream stream;

  TopkCall(const std::vector<Scores>& scores, const std::vector<int64_t>* ties_kept,
           const std::vector<Selection>& wanted, const std::vector<bool*>& mask,
           int64_t* memory, const TopkWorkspace& at, int multiprocessors, Stream on)
      : n(static_cast<int>(wanted.size())), stream(on) {
    std::vector<ScoreEntry> entries;
    int64_t chunks = 0;
    for (size_t i = 0; i < scores.size(); ++i) {
      entries.push_back(
          {scores[i].data, scores[i].size, chunks, ties_kept ? (*ties_kept)[i] : 0});
      chunks += chunks_of(scores[i].size);
    }
    std::vector<uint64_t> words;  // in the workspace's order
    append(words, entries);
    append(words, wanted);
    append(words, mask);
    upload(words, memory + at.entries, stream);
    table = {reinterpret_cast<const ScoreEntry*>(memory + at.entries),
             static_cast<int64_t>(entries.size()), chunks};
    bins = reinterpret_cast<unsigned long long*>(memory + at.bins);
    selections = reinterpret_cast<Selection*>(memory + at.selections);
    masks = reinterpret_cast<bool**>(memory + at.masks);
    ties = memory + at.ties;
    const int64_t resident = int64_t{TOPK_BLOCKS} * multiprocessors;
    grid = static_cast<unsigned>(std::clamp<int64_t>(chunks, 1, resident));
  }
};

constexpr size_t SCAN_BYTES = TOPK_THREADS * sizeof(int64_t);

// Finds the thresholds, digit by digit. The first histogram is that of all selections.
inline void find_thresholds(const TopkCall& call, unsigned long long* nonfinite,
                            float* thresholds) {
  unsigned long long* bins = call.bins;
  for (const Digit& digit : DIGITS) {
    const bool first = digit.prefix_bits == 0;
    const int n = first ? std::min(call.n, 1) : call.n;
    const size_t bytes = static_cast<size_t>(n) * sizeof(uint32_t) << digit.bits;
    launch(topk_histogram_kernel, dim3(call.grid), TOPK_THREADS, bytes, call.stream,
           call.table, call.selections, n, digit, bins, first ? nonfinite : nullptr);
    if (n == 0) return;
    const int64_t stride = first ? 0 : int64_t{1} << digit.bits;
    launch(topk_decide_kernel, dim3(call.n), TOPK_THREADS, SCAN_BYTES, call.stream,
           call.selections, bins, stride, digit, thresholds);
    bins += n * MOST_BINS;
  }
}

inline void write_masks(const TopkCall& call, bool per_tensor) {
  if (call.n == 0) return;
  launch(topk_count_ties_kernel, dim3(call.grid), TOPK_THREADS, SCAN_BYTES, call.stream,
         call.table, call.selections, call.n, call.ties);
  launch(topk_scan_ties_kernel, dim3(call.n), TOPK_THREADS, SCAN_BYTES, call.stream,
         call.selections, call.table.chunks, call.ties);
  launch(topk_mask_kernel, dim3(call.grid), TOPK_THREADS, SCAN_BYTES, call.stream,
         call.table, call.selections, call.n, call.ties, call.masks, per_tensor);
}

// ---- global_topk: up to TOPK_KEEPS selections a call ----

inline TopkWorkspace topk_workspace(const std::vector<Scores>& scores, int64_t n) {
  return {scores, n, (1 + 2 * n) * MOST_BINS};
}

// `memory` is zeroed; `nonfinite` is zeroed, or null where it has been counted before;
// `masks` has the tensors' masks selection after selection.
inline void run_topk(const std::vector<Scores>& scores,
                     const std::vector<int64_t>& keep, const std::vector<bool*>& masks,
                     float* thresholds, int64_t* nonfinite, int64_t* memory,
                     int multiprocessors, Stream stream) {
  std::vector<Selection> wanted;
  for (const int64_t k : keep) wanted.push_back({k, k, 0, 0});
  const TopkCall call(scores, nullptr, wanted, masks, memory,
                      topk_workspace(scores, static_cast<int64_t>(keep.size())),
                      multiprocessors, stream);
  find_thresholds(call, reinterpret_cast<unsigned long long*>(nonfinite), thresholds);
  write_masks(call, false);
}

// ---- topk_histogram ----

inline TopkWorkspace histogram_workspace(const std::vector<Scores>& scores) {
  return {scores, 1, 0};
}

// Adds to the zeroed `counts`.
inline void run_topk_histogram(const std::vector<Scores>& scores, uint64_t prefix,
                               Digit digit, int64_t* counts, int64_t* memory,
                               int multiprocessors, Stream stream) {
  const TopkCall call(scores, nullptr, {{0, 0, 0, prefix}}, {}, memory,
                      histogram_workspace(scores), multiprocessors, stream);
  const auto totals = reinterpret_cast<unsigned long long*>(counts);
  if (digit.bits > SHARED_DIGIT_BITS)
    launch(topk_long_histogram_kernel, dim3(call.grid), TOPK_THREADS, 0, stream,
           call.table, call.selections, digit, totals);
  else
    launch(topk_histogram_kernel, dim3(call.grid), TOPK_THREADS,
           sizeof(uint32_t) << digit.bits, stream, call.table, call.selections, 1,
           digit, totals, nullptr);
}

// ---- topk_masks ----

inline TopkWorkspace masks_workspace(const std::vector<Scores>& scores) {
  return {scores, 1, 0};
}

inline void run_topk_masks(const std::vector<Scores>& scores, float threshold,
                           const std::vector<int64_t>& ties,
                           const std::vector<bool*>& masks, int64_t* memory,
                           int multiprocessors, Stream stream) {
  // Neither all ties nor none: `left` and `equal` differ.
  const Selection selection{1, 0, 1, key_of(threshold)};
  const TopkCall call(scores, &ties, {selection}, masks, memory,
                      masks_workspace(scores), multiprocessors, stream);
  write_masks(call, true);
}

}  // namespace fisherprune
