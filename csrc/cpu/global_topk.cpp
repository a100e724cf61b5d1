// global_topk on the CPU.
#include "../global_topk_args.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <tuple>

namespace fisherprune {
namespace {

int64_t count_nonfinite(const Scores& s) {
  return std::count_if(s.data, s.data + s.size,
                       [](float v) { return !std::isfinite(v); });
}

// Masks of the entries above `threshold` and the first ties[i] of tensor i that equal
// it.
std::vector<Tensor> masks_at(const ScoreList& list, uint32_t threshold,
                             const std::vector<int64_t>& ties) {
  std::vector<Tensor> masks;
  for (const Tensor& t : list.tensors) masks.push_back(empty_mask(t));
  torch::stable::parallel_for(0, masks.size(), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      bool* mask = static_cast<bool*>(masks[i].data_ptr());
      int64_t left = ties[i];
      for (int64_t j = 0; j < list.scores[i].size; ++j) {
        const uint32_t key = key_of(list.scores[i].data[j]);
        mask[j] = key > threshold || (key == threshold && left-- > 0);
      }
    }
  });
  return masks;
}

// Of the `left` entries equal to the threshold that may be kept, how many in each
// tensor.
std::vector<int64_t> share_ties(const ScoreList& list, uint32_t threshold,
                                int64_t left) {
  std::vector<int64_t> ties;
  for (const Scores& s : list.scores) {
    const int64_t equal = std::count_if(
        s.data, s.data + s.size, [&](float v) { return key_of(v) == threshold; });
    ties.push_back(std::min(equal, left));
    left -= ties.back();
  }
  return ties;
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> global_topk(std::vector<Tensor> scores,
                                                            std::vector<int64_t> keep) {
  const ScoreList list = score_list("global_topk", scores);
  check_keep("global_topk", keep, list.total);
  Tensor nonfinite = torch::stable::new_empty(
      scores[0], {static_cast<int64_t>(scores.size())}, ScalarType::Long);
  Tensor thresholds = torch::stable::new_empty(
      scores[0], {static_cast<int64_t>(keep.size())}, ScalarType::Float);
  std::vector<uint32_t> keys;
  for (size_t i = 0; i < list.scores.size(); ++i) {
    const Scores& s = list.scores[i];
    static_cast<int64_t*>(nonfinite.data_ptr())[i] = count_nonfinite(s);
    std::transform(s.data, s.data + s.size, std::back_inserter(keys), key_of);
  }
  std::vector<Tensor> masks;
  for (size_t i = 0; i < keep.size(); ++i) {
    float threshold = std::numeric_limits<float>::infinity();
    int64_t above = 0;
    if (keep[i] > 0) {
      std::nth_element(keys.begin(), keys.begin() + (keep[i] - 1), keys.end(),
                       std::greater<uint32_t>());
      threshold = value_of(keys[keep[i] - 1]);
      above = std::count_if(keys.begin(), keys.end(),
                            [&](uint32_t k) { return k > keys[keep[i] - 1]; });
    }
    static_cast<float*>(thresholds.data_ptr())[i] = threshold;
    const uint32_t key = key_of(threshold);
    for (Tensor& m : masks_at(list, key, share_ties(list, key, keep[i] - above)))
      masks.push_back(m);
  }
  return {masks, thresholds, nonfinite};
}

Tensor topk_histogram(std::vector<Tensor> scores, int64_t prefix, int64_t prefix_bits,
                      int64_t digit_bits) {
  const ScoreList list = score_list("topk_histogram", scores);
  Tensor counts =
      torch::stable::new_zeros(scores[0], {int64_t{1} << digit_bits}, ScalarType::Long);
  int64_t* count = static_cast<int64_t*>(counts.data_ptr());
  const uint64_t mask = (uint64_t{1} << digit_bits) - 1;
  for (const Scores& s : list.scores)
    for (int64_t j = 0; j < s.size; ++j) {
      const uint64_t key = key_of(s.data[j]);
      if (static_cast<int64_t>(key >> (32 - prefix_bits)) == prefix)
        ++count[key >> (32 - prefix_bits - digit_bits) & mask];
    }
  return counts;
}

std::vector<Tensor> topk_masks(std::vector<Tensor> scores, double threshold,
                               std::vector<int64_t> ties) {
  const ScoreList list = score_list("topk_masks", scores);
  check(ties.size() == scores.size(),
        "topk_masks: ties must have one entry per score tensor, ", scores.size(),
        ", got ", ties.size());
  return masks_at(list, key_of(static_cast<float>(threshold)), ties);
}

}  // namespace
}  // namespace fisherprune

STABLE_TORCH_LIBRARY_IMPL(fisherprune, CPU, m) {
  m.impl("global_topk", TORCH_BOX(&fisherprune::global_topk));
  m.impl("topk_histogram", TORCH_BOX(&fisherprune::topk_histogram));
  m.impl("topk_masks", TORCH_BOX(&fisherprune::topk_masks));
}
