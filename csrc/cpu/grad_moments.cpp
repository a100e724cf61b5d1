// grad_moments on the CPU: each thread owns output channels and runs over all samples.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../grad_moments_args.h"

namespace fisherprune {
namespace {

float load(const View4& v, int64_t n, int64_t c, int64_t h, int64_t w) {
  const int64_t at =
      n * v.stride[0] + c * v.stride[1] + h * v.stride[2] + w * v.stride[3];
  if (v.dtype == Dtype::float32) return static_cast<const float*>(v.data)[at];
  if (v.dtype == Dtype::float16) return static_cast<const c10::Half*>(v.data)[at];
  return static_cast<const c10::BFloat16*>(v.data)[at];
}

void one_output(const GradMoments& m, int64_t o) {
  const ConvShape& s = m.shape;
  const int64_t first = o / s.group_outputs() * s.group_channels();
  std::vector<float> group(s.patch());
  for (int64_t n0 = 0; n0 < s.samples; n0 += s.group_size) {
    const int64_t n1 = std::min(n0 + s.group_size, s.samples);
    std::fill(group.begin(), group.end(), 0.f);
    for (int64_t n = n0; n < n1; ++n)
      for (int64_t p = 0; p < s.out_height; ++p)
        for (int64_t q = 0; q < s.out_width; ++q) {
          const float d = load(m.grad, n, o, p, q);
          int64_t k = 0;
          for (int64_t c = 0; c < s.group_channels(); ++c)
            for (int64_t y = 0; y < s.kernel_h; ++y)
              for (int64_t x = 0; x < s.kernel_w; ++x, ++k) {
                const int64_t h = p * s.stride_h - s.pad_h + y * s.dilation_h;
                const int64_t w = q * s.stride_w - s.pad_w + x * s.dilation_w;
                if (h < 0 || w < 0 || h >= s.height || w >= s.width) continue;
                group[k] += d * load(m.input, n, first + c, h, w);
              }
        }
    for (int64_t k = 0; k < s.patch(); ++k) {
      const float g = group[k] / static_cast<float>(n1 - n0);
      m.sum[o * s.patch() + k] += g;
      m.sum_sq[o * s.patch() + k] += g * g;
    }
  }
}

void grad_moments(const Tensor& input, const Tensor& grad, const Tensor& sum,
                  const Tensor& sum_sq, std::vector<int64_t> stride,
                  std::vector<int64_t> padding, std::vector<int64_t> dilation,
                  int64_t groups, int64_t group_size) {
  const GradMoments m = grad_moments_args(input, grad, sum, sum_sq, stride, padding,
                                          dilation, groups, group_size);
  torch::stable::parallel_for(0, m.shape.outputs, 1, [&](int64_t first, int64_t last) {
    for (int64_t o = first; o < last; ++o) one_output(m, o);
  });
}

}  // namespace
}  // namespace fisherprune

STABLE_TORCH_LIBRARY_IMPL(fisherprune, CPU, m) {
  m.impl("grad_moments", TORCH_BOX(&fisherprune::grad_moments));
}
