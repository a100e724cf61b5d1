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
  m.def(
      "sparse_conv2d(Tensor input, Tensor values, Tensor rows, Tensor columns, "
      "Tensor? bias, int[] kernel, int[] stride, int[] padding, int[] dilation, "
      "int groups, bool relu=False, Tensor? residual=None) -> Tensor");
  m.def(
      "sparse_conv2d_input(int[] input_size, Tensor values, Tensor rows, "
      "Tensor columns, Tensor grad, int[] kernel, int[] stride, int[] padding, "
      "int[] dilation, int groups) -> Tensor");
  m.def(
      "sparse_conv2d_weight(Tensor input, Tensor rows, Tensor columns, Tensor grad, "
      "int[] kernel, int[] stride, int[] padding, int[] dilation, int groups) "
      "-> Tensor");
  m.def(
      "batch_norm(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, "
      "float eps, bool relu) -> (Tensor output, Tensor mean, Tensor scale)");
  m.def(
      "batch_norm_backward(Tensor grad, Tensor input, Tensor output, Tensor? weight, "
      "Tensor mean, Tensor scale, bool relu, bool residual) -> (Tensor grad_input, "
      "Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "channel_affine_backward(Tensor grad, Tensor input, Tensor mean, Tensor scale, "
      "Tensor factor) -> (Tensor input_grad, Tensor weight_grad, Tensor bias_grad)");
  m.def(
      "max_pool2d(Tensor input, int[] kernel, int[] stride, int[] padding, "
      "bool ceil_mode=False) -> (Tensor output, Tensor index)");
  m.def(
      "max_pool2d_backward(Tensor grad, Tensor index, int[] input_size, int[] kernel, "
      "int[] stride, int[] padding, bool ceil_mode=False) -> Tensor");
  m.def(
      "lstm(Tensor ih, Tensor h0, Tensor c0, Tensor weight, Tensor? bias) "
      "-> (Tensor hidden, Tensor cells, Tensor gates, Tensor tanh)");
  m.def(
      "lstm_backward(Tensor grad, Tensor last, Tensor weight, Tensor cells, "
      "Tensor gates, Tensor tanh) -> (Tensor delta, Tensor grad_h0, Tensor grad_c0)");
  m.def("row_moments(Tensor rows, int group_size) -> (Tensor sum, Tensor sum_sq)");
  m.def("transpose(Tensor matrix) -> Tensor");
}
