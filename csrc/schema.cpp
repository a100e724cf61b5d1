// The ops' schemas, all in one place. Bodies register themselves, in each op's
// folder, where it has one for the device (cpu/op.cpp, cuda/op.cu).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fisherprune, m) {
  m.def(
      "grad_moments(Tensor input, Tensor grad, Tensor(a!) sum, Tensor(b!) sum_sq, "
      "int[] stride, int[] padding, int[] dilation, int groups, int group_size, "
      "bool allow_tf32=False) -> ()");
  m.def(
      "global_topk(Tensor[] scores, int[] keep, int[] ranks=[]) "
      "-> (Tensor[] masks, Tensor thresholds, Tensor nonfinite)");
  m.def(
      "topk_histogram(Tensor[] scores, int prefix, int prefix_bits, int digit_bits) "
      "-> Tensor");
  m.def("topk_masks(Tensor[] scores, float threshold, int[] ties) -> Tensor[]");
}
