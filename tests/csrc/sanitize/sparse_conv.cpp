// source: csrc/common/cpu/capability.cpp
// source: csrc/sparse_conv/cpu/correlate.cpp
// source: csrc/sparse_conv/cpu/cut.cpp
// source: csrc/sparse_conv/cpu/few.cpp
// source: csrc/sparse_conv/cpu/kernels.cpp
// source: csrc/sparse_conv/cpu/taps.cpp
// source: csrc/sparse_conv/cpu/tile.cpp
// source: csrc/sparse_conv/cpu/values.cpp
//
// Random sparse convolutions in every layout, dtype and instruction set, compared with
// naive loops in double. Operands and results lie in heap blocks of their exact size: a
// read or write beyond them is reported.
#include "sparse_conv/cpu/core.h"

#include <functional>

#include "operands.h"

namespace {

using Numbers = std::vector<double>;

struct Weights {
  std::vector<int32_t> rows{0}, columns;
  std::vector<float> values;
  Pattern pattern() const {
    return {rows.data(), columns.data(), static_cast<int64_t>(columns.size())};
  }
};

Weights weights(const SparseConvShape& s) {
  Weights w;
  const int64_t patch = s.group_channels() * s.kernel_h * s.kernel_w;
  const int64_t share = draw(0, 10);
  for (int64_t o = 0; o < s.outputs; ++o) {
    for (int64_t i = 0; i < patch; ++i)
      if (draw(1, 10) <= share) {
        w.columns.push_back(static_cast<int32_t>(i));
        w.values.push_back(static_cast<float>(draw(-8, 8)) / 4);
      }
    w.rows.push_back(static_cast<int32_t>(w.columns.size()));
  }
  return w;
}

struct Place {
  int64_t weight, n, o, p, q, c, h, w;
};

void for_each_product(const SparseConvShape& s, const Weights& weights,
                      const std::function<void(const Place&)>& each) {
  const int64_t kernel = s.kernel_h * s.kernel_w;
  for (int64_t o = 0; o < s.outputs; ++o)
    for (int64_t i = weights.rows[o]; i < weights.rows[o + 1]; ++i) {
      const int64_t column = weights.columns[i], at = column % kernel;
      const int64_t c = o / s.group_outputs() * s.group_channels() + column / kernel;
      for (int64_t p = 0; p < s.out_height; ++p)
        for (int64_t q = 0; q < s.out_width; ++q) {
          const int64_t h = p * s.stride_h - s.pad_h + at / s.kernel_w * s.dilation_h;
          const int64_t w = q * s.stride_w - s.pad_w + at % s.kernel_w * s.dilation_w;
          if (h < 0 || w < 0 || h >= s.height || w >= s.width) continue;
          for (int64_t n = 0; n < s.samples; ++n) each({i, n, o, p, q, c, h, w});
        }
    }
}

// The numbers as a result holds them: their sums are exact in float32.
Numbers held(Numbers numbers, Dtype dtype) {
  if (dtype == Dtype::bfloat16)
    for (double& each : numbers) each = to_float(to_bfloat16(static_cast<float>(each)));
  return numbers;
}

void compare(const SparseConvShape& s, Capability capability, const char* what,
             const Numbers& exact, const Entries& found) {
  const Numbers wanted = held(exact, found.dtype);
  double error = 0, size = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    error += std::pow(wanted[i] - found.at(i), 2);
    size += wanted[i] * wanted[i];
  }
  if (std::sqrt(error) <= 1e-6 * std::sqrt(size) + 1e-5) return;
  fail(
      "%s with %s: N %ld C %ld H %ld W %ld O %ld Y %ld X %ld stride %ld %ld pad %ld "
      "%ld dilation %ld %ld groups %ld",
      what, name_of(capability), long(s.samples), long(s.channels), long(s.height),
      long(s.width), long(s.outputs), long(s.kernel_h), long(s.kernel_w),
      long(s.stride_h), long(s.stride_w), long(s.pad_h), long(s.pad_w),
      long(s.dilation_h), long(s.dilation_w), long(s.groups));
}

int64_t positions(int64_t size, int64_t kernel, int64_t stride, int64_t pad,
                  int64_t dilation) {
  return (size + 2 * pad - dilation * (kernel - 1) - 1) / stride + 1;
}

SparseConvShape random_shape() {
  SparseConvShape s{};
  s.groups = draw(1, 3);
  s.samples = draw(0, 3) ? draw(0, 40) : draw(32, 100);
  s.channels = s.groups * draw(1, 6), s.outputs = s.groups * draw(1, 6);
  s.kernel_h = draw(1, 3), s.kernel_w = draw(1, 3);
  s.stride_h = draw(1, 3), s.stride_w = draw(1, 3);
  s.pad_h = draw(0, 2), s.pad_w = draw(0, 2);
  s.dilation_h = draw(1, 2), s.dilation_w = draw(1, 2);
  s.height = draw(5, 9), s.width = draw(5, 20);
  s.out_height = positions(s.height, s.kernel_h, s.stride_h, s.pad_h, s.dilation_h);
  s.out_width = positions(s.width, s.kernel_w, s.stride_w, s.pad_w, s.dilation_w);
  return s;
}

void run(const SparseConvShape& s, Capability capability) {
  const Weights w = weights(s);
  const int64_t in[]{s.samples, s.channels, s.height, s.width};
  const int64_t out[]{s.samples, s.outputs, s.out_height, s.out_width};
  const Operand4 x = operand(in, any_dtype(), any_layout());
  const Operand4 g = operand(out, any_dtype(), any_layout());
  const bool relu = draw(0, 1);
  std::vector<float> bias(s.outputs);
  for (float& b : bias) b = static_cast<float>(draw(-4, 4));

  Numbers y(s.outputs * s.out_height * s.out_width * s.samples);
  Numbers gx(s.channels * s.height * s.width * s.samples), gw(w.values.size());
  const auto at = [&](int64_t c, int64_t h, int64_t width, int64_t v, int64_t n) {
    return static_cast<size_t>(((c * h + v / width) * width + v % width) * s.samples +
                               n);
  };
  std::vector<float> residual(draw(0, 1) ? y.size() : 0);
  for (float& r : residual) r = static_cast<float>(draw(-4, 4));
  std::vector<BFloat16> halves(residual.size());
  std::transform(residual.begin(), residual.end(), halves.begin(), to_bfloat16);
  for (size_t i = 0; i < y.size(); ++i)
    y[i] = bias[i / (s.out_height * s.out_width * s.samples)] +
           (residual.empty() ? 0 : residual[i]);
  for_each_product(s, w, [&](const Place& i) {
    const double input = x.at(i.n, i.c, i.h, i.w), grad = g.at(i.n, i.o, i.p, i.q);
    y[at(i.o, s.out_height, s.out_width, i.p * s.out_width + i.q, i.n)] +=
        w.values[i.weight] * input;
    gx[at(i.c, s.height, s.width, i.h * s.width + i.w, i.n)] +=
        w.values[i.weight] * grad;
    gw[i.weight] += input * grad;
  });
  if (relu)
    for (double& each : y) each = std::max(each, 0.);

  const sparse_conv::Machine machine{capability, two_threads, draw(1, 20)};
  const Entries found_y(result_dtype(x.view.dtype), y.size()),
      found_gx(result_dtype(g.view.dtype), gx.size()),
      found_gw(Dtype::float32, gw.size());
  const void* const before = found_y.dtype == Dtype::float32
                                 ? static_cast<const void*>(residual.data())
                                 : halves.data();
  const Epilogue epilogue{bias.data(), residual.empty() ? nullptr : before, relu};
  sparse_conv::output(s, x.view, w.pattern(), w.values.data(), epilogue, found_y.data(),
                      machine);
  compare(s, capability, "output", y, found_y);
  sparse_conv::input_gradient(s, g.view, w.pattern(), w.values.data(), found_gx.data(),
                              machine);
  compare(s, capability, "gradient of the input", gx, found_gx);
  sparse_conv::values_gradient(s, x.view, g.view, w.pattern(), found_gw.floats(),
                               machine);
  compare(s, capability, "gradient of the weights", gw, found_gw);
}

}  // namespace

int main() {
  for (const Capability capability : capabilities())
    for (int i = 0; i < cases(120); ++i) run(random_shape(), capability);
  std::puts("sparse_conv: all equal");
}
