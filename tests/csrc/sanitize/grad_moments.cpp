// source: csrc/common/cpu/capability.cpp
// source: csrc/grad_moments/cpu/meets.cpp
// source: csrc/grad_moments/cpu/microkernel.cpp
// source: csrc/grad_moments/cpu/core.cpp
// source: csrc/grad_moments/cpu/depthwise.cpp
// source: csrc/grad_moments/cpu/depthwise_kernels.cpp
// source: csrc/grad_moments/cpu/linear.cpp
// source: csrc/grad_moments/cpu/linear_kernels.cpp
// source: csrc/grad_moments/cpu/narrow.cpp
// source: csrc/grad_moments/cpu/narrow_kernels.cpp
// source: csrc/grad_moments/cpu/narrow_planes.cpp
// source: csrc/grad_moments/cpu/pack.cpp
// source: csrc/grad_moments/cpu/parts.cpp
// source: csrc/grad_moments/cpu/plain.cpp
// source: csrc/grad_moments/cpu/plan.cpp
// source: csrc/grad_moments/cpu/tiles.cpp
// source: csrc/grad_moments/cpu/units.cpp
// source: csrc/grad_moments/cpu/winograd.cpp
// source: csrc/grad_moments/cpu/winograd_cost.cpp
//
// Random layers in every layout, dtype and instruction set, compared with a naive loop
// in double. Operands lie in heap blocks of their exact size: a read or write beyond
// them is reported.
#include "grad_moments/cpu/core.h"

#include "operands.h"

namespace {

double gradient(const ConvShape& s, const Operand4& a, const Operand4& d, int64_t n,
                int64_t o, int64_t c, int64_t y, int64_t x) {
  double g = 0;
  for (int64_t p = 0; p < s.out_height; ++p)
    for (int64_t q = 0; q < s.out_width; ++q) {
      const int64_t h = p * s.stride_h - s.pad_h + y * s.dilation_h;
      const int64_t w = q * s.stride_w - s.pad_w + x * s.dilation_w;
      if (h < 0 || w < 0 || h >= s.height || w >= s.width) continue;
      const int64_t first = o / s.group_outputs() * s.group_channels();
      g += d.at(n, o, p, q) * a.at(n, first + c, h, w);
    }
  return g;
}

[[noreturn]] void fail(const ConvShape& s, Capability capability, const char* what) {
  ::fail(
      "%s with %s: N %ld C %ld H %ld W %ld O %ld Y %ld X %ld stride %ld %ld pad %ld "
      "%ld dilation %ld %ld groups %ld group_size %ld",
      what, name_of(capability), long(s.samples), long(s.channels), long(s.height),
      long(s.width), long(s.outputs), long(s.kernel_h), long(s.kernel_w),
      long(s.stride_h), long(s.stride_w), long(s.pad_h), long(s.pad_w),
      long(s.dilation_h), long(s.dilation_w), long(s.groups), long(s.group_size));
}

struct Moments {
  std::vector<double> sum, sum_sq;
};

Moments naive(const ConvShape& s, const Operand4& a, const Operand4& d) {
  Moments m;
  for (int64_t o = 0; o < s.outputs; ++o)
    for (int64_t c = 0; c < s.group_channels(); ++c)
      for (int64_t y = 0; y < s.kernel_h; ++y)
        for (int64_t x = 0; x < s.kernel_w; ++x) {
          double sum = 0.5, sum_sq = 0.25;  // what the accumulators begin with
          for (int64_t n = 0; n < s.samples; n += s.group_size) {
            const int64_t end = std::min(n + s.group_size, s.samples);
            double g = 0;
            for (int64_t i = n; i < end; ++i) g += gradient(s, a, d, i, o, c, y, x);
            g /= static_cast<double>(end - n);
            sum += g;
            sum_sq += g * g;
          }
          m.sum.push_back(sum);
          m.sum_sq.push_back(sum_sq);
        }
  return m;
}

double distance(const float* got, const std::vector<double>& truth) {
  double error = 0, size = 0;
  for (size_t i = 0; i < truth.size(); ++i) {
    error += (got[i] - truth[i]) * (got[i] - truth[i]);
    size += truth[i] * truth[i];
  }
  return std::sqrt(error / std::max(size, 1e-30));
}

// Float32 planes of some channels, of which the columns before `end` are scaled.
void scale_columns(const Operand4& x, int64_t samples, int64_t channel,
                   int64_t channels, int64_t height, int64_t end, float factor) {
  for (int64_t n = 0; n < samples; ++n)
    for (int64_t c = channel; c < channel + channels; ++c)
      for (int64_t h = 0; h < height; ++h)
        for (int64_t w = 0; w < end; ++w)
          x.entries.floats()[n * x.view.stride[0] + c * x.view.stride[1] +
                             h * x.view.stride[2] + w] *= factor;
}

void test(const ConvShape& s, Dtype dtype, Layout input_layout, Layout grad_layout,
          bool hidden = false) {
  const Operand4 a =
      operand({s.samples, s.channels, s.height, s.width}, dtype, input_layout);
  const Operand4 d =
      operand({s.samples, s.outputs, s.out_height, s.out_width}, dtype, grad_layout);
  if (hidden) {  // large inputs of some channels, zero gradients of some outputs there
    scale_columns(a, s.samples, 3, 30, s.height, s.width / 2, 0x1p20f);
    scale_columns(d, s.samples, 20, 25, s.out_height, s.width / 2 + s.pad_w, 0.f);
  }
  const Moments truth = naive(s, a, d);
  const int64_t size = s.outputs * s.patch();
  for (const Capability capability : capabilities()) {
    const Block sum = empty(size), sum_sq = empty(size);
    std::fill_n(sum.get(), size, 0.5f);
    std::fill_n(sum_sq.get(), size, 0.25f);
    cpu::grad_moments::accumulate({s, a.view, d.view, sum.get(), sum_sq.get()},
                                  capability, two_threads, draw(1, 8));
    if (distance(sum.get(), truth.sum) > 1e-5) fail(s, capability, "wrong sum");
    if (distance(sum_sq.get(), truth.sum_sq) > 1e-5)
      fail(s, capability, "wrong sum_sq");
  }
}

ConvShape with_outputs(ConvShape s) {
  const auto extent = [](int64_t size, int64_t pad, int64_t dilation, int64_t kernel,
                         int64_t stride) {
    const int64_t span = size + 2 * pad - dilation * (kernel - 1) - 1;
    return span < 0 ? 0 : span / stride + 1;
  };
  s.out_height = extent(s.height, s.pad_h, s.dilation_h, s.kernel_h, s.stride_h);
  s.out_width = extent(s.width, s.pad_w, s.dilation_w, s.kernel_w, s.stride_w);
  return s;
}

ConvShape random_shape() {
  const int64_t some[] = {1, 1, 1, 2, 5, 19};
  ConvShape s{};
  s.samples = draw(0, 7);
  s.groups = some[draw(0, 5)];
  s.channels = s.groups * draw(1, 5);
  s.outputs = s.groups * draw(1, draw(0, 3) ? 9 : 70);
  s.height = draw(1, 10), s.width = draw(1, 10);
  s.kernel_h = draw(1, 3), s.kernel_w = draw(1, 3);
  s.stride_h = draw(1, 3), s.stride_w = draw(1, 3);
  s.pad_h = draw(0, 3), s.pad_w = draw(0, 3);
  s.dilation_h = draw(1, 2), s.dilation_w = draw(1, 2);
  s.group_size = draw(1, 8);
  return with_outputs(s);
}

// Groups of few channels and outputs, images from less than one vector to several.
ConvShape narrow_shape() {
  ConvShape s{};
  s.samples = draw(1, 5);
  s.groups = draw(0, 1) ? draw(2, 40) : 32;  // 32: whole vectors in channels_last
  s.channels = s.groups * (draw(0, 1) ? 1 : draw(1, 8));
  s.outputs = s.groups * (draw(0, 1) ? 1 : draw(1, 8));
  s.height = draw(1, 20), s.width = draw(1, 40);
  s.kernel_h = draw(1, 7), s.kernel_w = draw(1, 7);
  s.stride_h = draw(1, 3), s.stride_w = draw(1, 3);
  s.pad_h = draw(0, 8), s.pad_w = draw(0, 8);
  s.dilation_h = draw(1, 3), s.dilation_w = draw(1, 3);
  s.group_size = draw(1, 6);
  return with_outputs(s);
}

// 1 x 1 kernels over few positions.
ConvShape linear_shape() {
  ConvShape s{};
  s.samples = draw(1, 40);
  s.groups = 1;
  s.channels = draw(16, 90), s.outputs = draw(1, 100);
  s.height = draw(1, 5), s.width = draw(0, 1) ? 1 : draw(1, 5);
  s.kernel_h = s.kernel_w = s.dilation_h = s.dilation_w = 1;
  s.stride_h = draw(1, 2), s.stride_w = draw(1, 2);
  s.group_size = draw(0, 1) ? 1 : draw(1, 9);
  return with_outputs(s);
}

ConvShape shape(int64_t n, int64_t c, int64_t o, int64_t h, int64_t w, int64_t kernel,
                int64_t pad, int64_t group_size) {
  return with_outputs(
      {n, c, h, w, o, 0, 0, kernel, kernel, 1, 1, pad, pad, 1, 1, 1, group_size});
}

}  // namespace

int main() {
  for (int i = 0; i < cases(300); ++i)
    test(random_shape(), any_dtype(), any_layout(), any_layout());
  for (int i = 0; i < cases(120); ++i)
    test(i % 2 ? narrow_shape() : linear_shape(), any_dtype(), any_layout(),
         any_layout());
  // Channels side by side; images that are cut into rows.
  for (const Layout layout : {nchw, nhwc}) {
    test(with_outputs({2, 32, 9, 13, 32, 0, 0, 3, 3, 2, 1, 1, 1, 1, 1, 32, 1}),
         Dtype::float32, layout, layout);
    test(with_outputs({2, 3, 250, 190, 6, 0, 0, 5, 3, 2, 1, 3, 1, 1, 2, 3, 2}),
         Dtype::float32, layout, layout);
  }
  // Several blocks of groups in a linear layer, of few positions and of many.
  test(shape(700, 17, 50, 1, 2, 1, 0, 3), Dtype::float32, nhwc, nhwc);
  for (const Layout layout : {nchw, nhwc})
    test(shape(70, 90, 53, 8, 8, 1, 0, 3), Dtype::float32, layout, layout);
  // Several blocks of samples, groups that straddle them, samples cut into rows.
  test(shape(30, 2, 65, 24, 24, 3, 1, 29), Dtype::float32, nchw, nchw);
  test(shape(65, 2, 66, 12, 12, 2, 1, 9), Dtype::float32, nhwc, nchw);
  test(shape(3, 1, 9, 370, 190, 2, 1, 2), Dtype::float32, nchw, nhwc);
  // Winograd: uneven tiles, rest panels, groups, images cut into rows, every layout.
  for (int i = 0; i < kLayouts; ++i)
    test(shape(5, 50, 66, draw(7, 11), draw(7, 11), 3, draw(0, 3), draw(1, 3)),
         static_cast<Dtype>(i % 3), static_cast<Layout>(i), any_layout());
  test(shape(3, 49, 49, 21, 41, 3, 1, 2), Dtype::float32, nchw, nchw);
  // What is left to the plain way: parts, with rest panels.
  for (int i = 0; i < 3; ++i)
    test(shape(3, draw(40, 66), draw(49, 66), 9, 11, 3, 1, i + 1), Dtype::float32, nchw,
         nchw, true);
  // Linear layers: products over more samples than one run.
  test(shape(5000, 7, 9, 1, 1, 1, 0, 1), Dtype::float32, nchw, nchw);
  test(shape(5000, 3, 2, 1, 1, 1, 0, 3000), Dtype::bfloat16, nhwc, gaps);
  // Padding far beyond the image: tap by tap.
  for (int i = 0; i < kLayouts; ++i)
    test(with_outputs({5, 4, 6, 5, 6, 0, 0, 3, 2, 1 + i % 2 * (1 << 30), 1, 1 << 30, 99,
                       1 << 30, 90, 2, 2}),
         static_cast<Dtype>(i % 3), static_cast<Layout>(i), any_layout());
  std::puts("grad_moments: all right");
}
