// From the ops' tensors to the kernels' arguments: every check of the top-k ops.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "common/check.h"
#include "global_topk/contract.h"

namespace fisherprune {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Contiguous float32 scores, and the tensors that keep them alive. Tensors of another
// layout are copied, channels_last too: ties are decided by the index in the tensor.
struct ScoreList {
  const char* op;  // for messages
  std::vector<Tensor> tensors;
  std::vector<Scores> scores;
  int64_t total = 0;
};

inline ScoreList score_list(const char* op, const std::vector<Tensor>& tensors) {
  check(!tensors.empty(), op, ": scores must hold at least one tensor");
  ScoreList list{op, {}, {}, 0};
  const bool cuda = tensors[0].is_cuda();
  const auto device = tensors[0].get_device_index();
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& t = tensors[i];
    check(t.scalar_type() == ScalarType::Float, op, ": scores[", i,
          "] must be float32, got ", torch::headeronly::toString(t.scalar_type()));
    check(t.get_device_index() == device && t.is_cuda() == cuda, op, ": scores[", i,
          "] must be on the device of scores[0]");
    // contiguous() goes through the dispatcher, which takes longer than all else here.
    list.tensors.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
    list.scores.push_back(
        {static_cast<const float*>(list.tensors.back().data_ptr()), t.numel()});
    list.total += list.scores.back().size;
  }
  return list;
}

inline void check_ranks(const char* op, const char* name,
                        const std::vector<int64_t>& ranks, int64_t total) {
  for (const int64_t k : ranks)
    check(k >= 0 && k <= total, op, ": ", name, " must lie in [0, ", total, "], got ",
          k);
}

inline void check_digits(const char* op, int64_t prefix, int64_t prefix_bits,
                         int64_t digit_bits) {
  check(digit_bits >= 1 && digit_bits <= 16, op,
        ": digit_bits must lie in [1, 16], got ", digit_bits);
  check(prefix_bits >= 0 && prefix_bits + digit_bits <= 32, op,
        ": prefix_bits must lie in [0, ", 32 - digit_bits, "], got ", prefix_bits);
  check(prefix >= 0 && prefix >> prefix_bits == 0, op, ": prefix must lie in [0, ",
        int64_t{1} << prefix_bits, "), got ", prefix);
}

inline void check_ties(const char* op, const std::vector<int64_t>& ties,
                       size_t tensors) {
  check(ties.size() == tensors, op, ": ties must have one entry per score tensor, ",
        tensors, ", got ", ties.size());
  for (const int64_t t : ties) check(t >= 0, op, ": ties must be at least 0, got ", t);
}

inline void check_threshold(const char* op, double threshold) {
  check(threshold == threshold, op, ": threshold must be a number, got NaN");
}

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// Returns a contiguous tensor on the device of `like`. `dtype` is a number of torch's C
// interface, which is used directly, because there are many masks: one for each tensor
// and selection. On the CPU it goes past the dispatcher, which new_empty() uses and
// which would take longer than most of the masks. On CUDA it does not box the
// arguments.
inline Tensor empty_tensor(const char* op, const Tensor& like, Sizes sizes,
                           int32_t dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1, size = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) {
    strides[d] = stride;
    size *= sizes[d];
  }
  int32_t device = 0;
  AtenTensorHandle made = nullptr;
  const bool ok =
      aoti_torch_get_device_type(like.get(), &device) == AOTI_TORCH_SUCCESS &&
      aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype,
                               device, like.get_device_index(),
                               &made) == AOTI_TORCH_SUCCESS;
  check(ok, op, ": a tensor of ", size, " entries could not be allocated");
  return Tensor(made);
}

// Each mask has memory of its own, so that it can be saved and freed alone.
inline Tensor empty_mask(const char* op, const Tensor& like) {
  return empty_tensor(op, like, like.sizes(), aoti_torch_dtype_bool());
}

}  // namespace fisherprune
