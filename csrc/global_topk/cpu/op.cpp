// The ops global_topk, topk_histogram and topk_masks on the CPU: checks, outputs,
// calls.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "common/cpu/op.h"
#include "common/cpu/pages.h"
#include "global_topk/args.h"
#include "global_topk/cpu/select.h"

namespace fisherprune::cpu::global_topk {
namespace {

constexpr float kAboveAll = std::numeric_limits<float>::infinity();  // of rank 0

Task task_of(const ScoreList& list) { return Task(list.scores, in_parallel); }

std::vector<Tensor> empty_masks(const ScoreList& list) {
  std::vector<Tensor> masks;
  std::vector<Fresh> fresh;
  for (const Tensor& t : list.tensors) {
    masks.push_back(empty_mask(list.op, t));
    fresh.push_back({masks.back().data_ptr(), masks.back().numel()});
  }
  prefer_large_pages(fresh, in_parallel);
  return masks;
}

std::vector<uint8_t*> bytes_of(const std::vector<Tensor>& masks) {
  std::vector<uint8_t*> bytes;
  for (const Tensor& m : masks) bytes.push_back(static_cast<uint8_t*>(m.data_ptr()));
  return bytes;
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> global_topk_op(
    std::vector<Tensor> scores, std::vector<int64_t> keep, std::vector<int64_t> ranks) {
  const ScoreList list = score_list("global_topk", scores);
  check_ranks("global_topk", "keep", keep, list.total);
  check_ranks("global_topk", "ranks", ranks, list.total);
  std::vector<Tensor> masks;
  std::vector<Query> queries;
  for (const int64_t k : keep) {
    const std::vector<Tensor> own = empty_masks(list);
    masks.insert(masks.end(), own.begin(), own.end());
    queries.push_back(k ? Query(k, bytes_of(own))
                        : fixed_query(bytes_of(own), kAboveAll));
  }
  for (const int64_t k : ranks)
    if (k) queries.push_back(Query(k, {}));
  const std::vector<int64_t> bad = select(task_of(list), queries);
  Tensor nonfinite = torch::stable::new_empty(
      scores[0], {static_cast<int64_t>(scores.size())}, ScalarType::Long);
  std::copy(bad.begin(), bad.end(), static_cast<int64_t*>(nonfinite.data_ptr()));
  Tensor thresholds = torch::stable::new_empty(
      scores[0], {static_cast<int64_t>(keep.size() + ranks.size())}, ScalarType::Float);
  float* threshold = static_cast<float*>(thresholds.data_ptr());
  const Query* query = queries.data();
  for (size_t i = 0; i < keep.size(); ++i) *threshold++ = value_of(query++->threshold);
  for (const int64_t k : ranks)
    *threshold++ = k ? value_of(query++->threshold) : kAboveAll;
  return {masks, thresholds, nonfinite};
}

Tensor topk_histogram_op(std::vector<Tensor> scores, int64_t prefix,
                         int64_t prefix_bits, int64_t digit_bits) {
  const ScoreList list = score_list("topk_histogram", scores);
  check_digits("topk_histogram", prefix, prefix_bits, digit_bits);
  const uint64_t low = static_cast<uint64_t>(prefix) << (32 - prefix_bits);
  const uint64_t high = low + (uint64_t{1} << (32 - prefix_bits)) - 1;
  std::vector<Histogram> one;
  one.emplace_back(Bracket{static_cast<uint32_t>(low), static_cast<uint32_t>(high)},
                   static_cast<int>(32 - prefix_bits - digit_bits));
  fill(task_of(list), one);
  Tensor counts = torch::stable::new_empty(scores[0], {one[0].bins}, ScalarType::Long);
  int64_t* count = static_cast<int64_t*>(counts.data_ptr());
  for (int64_t bin = 0; bin < one[0].bins; ++bin) count[bin] = one[0].at(bin);
  return counts;
}

std::vector<Tensor> topk_masks_op(std::vector<Tensor> scores, double threshold,
                                  std::vector<int64_t> ties) {
  const ScoreList list = score_list("topk_masks", scores);
  check_ties("topk_masks", ties, scores.size());
  check_threshold("topk_masks", threshold);
  std::vector<Tensor> masks = empty_masks(list);
  mask_at(task_of(list), fixed_query(bytes_of(masks), static_cast<float>(threshold)),
          std::move(ties));
  return masks;
}

}  // namespace
}  // namespace fisherprune::cpu::global_topk

STABLE_TORCH_LIBRARY_IMPL(fisherprune, CPU, m) {
  m.impl("global_topk", TORCH_BOX(&fisherprune::cpu::global_topk::global_topk_op));
  m.impl("topk_histogram",
         TORCH_BOX(&fisherprune::cpu::global_topk::topk_histogram_op));
  m.impl("topk_masks", TORCH_BOX(&fisherprune::cpu::global_topk::topk_masks_op));
}
