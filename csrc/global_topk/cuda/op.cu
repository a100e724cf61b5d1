// global_topk and its steps on CUDA: checks, outputs, workspace, launches.
#include "global_topk/args.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "common/cuda/op.cuh"
#include "global_topk/cuda/launch.cuh"

namespace fisherprune::cuda::global_topk {
namespace {

// Memory that the kernels themselves fill; the tensor owns it.
Tensor empty_words(const ScoreList& list, int64_t words) {
  return empty_tensor(list.op, list.tensors[0], {words}, aoti_torch_dtype_int64());
}

int64_t* words_of(const Tensor& t) { return static_cast<int64_t*>(t.data_ptr()); }

// Allocates `n` masks of each tensor, adds them to `masks`, returns where they lie.
std::vector<bool*> add_masks(const ScoreList& list, size_t n,
                             std::vector<Tensor>& masks) {
  std::vector<bool*> data;
  for (size_t k = 0; k < n; ++k)
    for (const Tensor& t : list.tensors) {
      masks.push_back(empty_mask(list.op, t));
      data.push_back(static_cast<bool*>(masks.back().data_ptr()));
    }
  return data;
}

std::tuple<std::vector<Tensor>, Tensor, Tensor> global_topk_op(
    std::vector<Tensor> scores, std::vector<int64_t> keep, std::vector<int64_t> ranks) {
  const ScoreList list = score_list("global_topk", scores);
  check_ranks("global_topk", "keep", keep, list.total);
  check_ranks("global_topk", "ranks", ranks, list.total);
  const size_t masked = keep.size();
  std::vector<int64_t> all = std::move(keep);
  all.insert(all.end(), ranks.begin(), ranks.end());
  const DeviceGuard guard(scores[0].get_device_index());
  const Tensor nonfinite = empty_words(list, static_cast<int64_t>(scores.size()));
  const Tensor thresholds =
      empty_tensor(list.op, scores[0], {static_cast<int64_t>(all.size())},
                   aoti_torch_dtype_float32());
  std::vector<Tensor> masks;
  size_t first = 0;
  do {  // once with no selection, too: it counts what is not finite
    const size_t last = std::min(first + TOPK_KEEPS, all.size());
    const std::vector<int64_t> some(all.begin() + first, all.begin() + last);
    const size_t own = std::clamp(masked, first, last) - first;
    const Tensor memory =
        empty_words(list, topk_workspace(list.scores, some.size(), own).words);
    const TopkCall call = start_topk(
        list.scores, some, own, static_cast<float*>(thresholds.data_ptr()) + first,
        first == 0 ? words_of(nonfinite) : nullptr, words_of(memory), multiprocessors(),
        current_stream(scores[0]));
    // These are hundreds of allocations, while the device finds the thresholds.
    write_masks(call, add_masks(list, own, masks), false);
    first = last;
  } while (first < all.size());
  return {masks, thresholds, nonfinite};
}

Tensor topk_histogram_op(std::vector<Tensor> scores, int64_t prefix,
                         int64_t prefix_bits, int64_t digit_bits) {
  const ScoreList list = score_list("topk_histogram", scores);
  check_digits("topk_histogram", prefix, prefix_bits, digit_bits);
  const DeviceGuard guard(scores[0].get_device_index());
  const Tensor counts = empty_words(list, int64_t{1} << digit_bits);
  const Tensor memory = empty_words(list, histogram_workspace(list.scores).words);
  run_topk_histogram(list.scores, static_cast<uint64_t>(prefix),
                     {static_cast<int>(prefix_bits), static_cast<int>(digit_bits)},
                     words_of(counts), words_of(memory), multiprocessors(),
                     current_stream(scores[0]));
  return counts;
}

std::vector<Tensor> topk_masks_op(std::vector<Tensor> scores, double threshold,
                                  std::vector<int64_t> ties) {
  const ScoreList list = score_list("topk_masks", scores);
  check_ties("topk_masks", ties, scores.size());
  check_threshold("topk_masks", threshold);
  const DeviceGuard guard(scores[0].get_device_index());
  std::vector<Tensor> masks;
  const std::vector<bool*> data = add_masks(list, 1, masks);
  const Tensor memory = empty_words(list, masks_workspace(list.scores).words);
  run_topk_masks(list.scores, static_cast<float>(threshold), ties, data,
                 words_of(memory), multiprocessors(), current_stream(scores[0]));
  return masks;
}

}  // namespace
}  // namespace fisherprune::cuda::global_topk

STABLE_TORCH_LIBRARY_IMPL(fisherprune, CUDA, m) {
  m.impl("global_topk", TORCH_BOX(&fisherprune::cuda::global_topk::global_topk_op));
  m.impl("topk_histogram",
         TORCH_BOX(&fisherprune::cuda::global_topk::topk_histogram_op));
  m.impl("topk_masks", TORCH_BOX(&fisherprune::cuda::global_topk::topk_masks_op));
}
