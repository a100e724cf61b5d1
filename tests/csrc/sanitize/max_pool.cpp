// source: csrc/common/cpu/capability.cpp
// source: csrc/max_pool/cpu/kernels.cpp
// source: csrc/max_pool/cpu/core.cpp
//
// Random windows in every dtype and instruction set, compared with a naive loop.
// Operands lie in heap blocks of their exact size: a read or write beyond them is
// reported.
#include "max_pool/cpu/core.h"

#include <limits>

#include "driver.h"

namespace {

// Small integers, many of them equal, which both dtypes hold; some NaN.
Entries random_entries(Dtype dtype, int64_t count) {
  Entries entries(dtype, count);
  for (int64_t i = 0; i < count; ++i)
    entries.set(i, draw(0, 40) ? static_cast<float>(draw(-4, 4))
                               : std::numeric_limits<float>::quiet_NaN());
  return entries;
}

bool same(float a, float b) { return a == b || (a != a && b != b); }

[[noreturn]] void fail(const MaxPoolShape& s, const char* what) {
  ::fail(
      "wrong %s: N %ld C %ld H %ld W %ld P %ld Q %ld kernel %ld %ld stride %ld "
      "%ld pad %ld %ld dtype %d",
      what, long(s.samples), long(s.channels), long(s.height), long(s.width),
      long(s.out_height), long(s.out_width), long(s.kernel_h), long(s.kernel_w),
      long(s.stride_h), long(s.stride_w), long(s.pad_h), long(s.pad_w), int(s.dtype));
}

// Compares one entry of the output, and adds its gradient where it belongs.
void compare(const MaxPoolShape& s, const Entries& x, const Entries& y,
             const uint8_t* index, const Entries& grad, std::vector<float>& sums,
             int64_t n, int64_t c, int64_t p, int64_t q) {
  float best = -std::numeric_limits<float>::infinity();
  int64_t place = -1, from = 0;
  for (int64_t v = 0; v < s.kernel_h; ++v)
    for (int64_t u = 0; u < s.kernel_w; ++u) {
      const int64_t h = p * s.stride_h - s.pad_h + v, w = q * s.stride_w - s.pad_w + u;
      if (h < 0 || w < 0 || h >= s.height || w >= s.width) continue;
      const int64_t i = ((c * s.height + h) * s.width + w) * s.samples + n;
      const float value = x.at(i);
      if (place < 0 || value > best || value != value)
        best = value, place = v * s.kernel_w + u, from = i;
    }
  const int64_t at = ((c * s.out_height + p) * s.out_width + q) * s.samples + n;
  if (!same(y.at(at), best)) fail(s, "output");
  if (index[at] != place) fail(s, "index");
  sums[from] += grad.at(at);
}

void test(const MaxPoolShape& s) {
  const int64_t in = s.samples * s.channels * s.height * s.width;
  const int64_t out = s.samples * s.channels * s.out_height * s.out_width;
  const Entries x = random_entries(s.dtype, in), grad = random_entries(s.dtype, out);
  for (const Capability capability : capabilities()) {
    const Entries y(s.dtype, out), grad_input(s.dtype, in);
    const std::unique_ptr<uint8_t[]> index(new uint8_t[out]);
    max_pool::forward({s, x.data(), y.data(), index.get()}, capability, two_threads);
    max_pool::backward({s, grad.data(), index.get(), grad_input.data()}, capability,
                       two_threads);
    std::vector<float> sums(in);
    for (int64_t c = 0; c < s.channels; ++c)
      for (int64_t p = 0; p < s.out_height; ++p)
        for (int64_t q = 0; q < s.out_width; ++q)
          for (int64_t n = 0; n < s.samples; ++n)
            compare(s, x, y, index.get(), grad, sums, n, c, p, q);
    for (int64_t i = 0; i < in; ++i)
      if (!same(grad_input.at(i), sums[i])) fail(s, "grad_input");
  }
}

int64_t windows(int64_t size, int64_t kernel, int64_t stride, int64_t pad, bool ceil) {
  const int64_t span = size + 2 * pad - kernel;
  const int64_t steps = (span + (ceil ? stride - 1 : 0)) / stride;
  return steps * stride >= size + pad ? steps : steps + 1;
}

MaxPoolShape random_shape(Dtype dtype) {
  MaxPoolShape s{};
  s.dtype = dtype;
  s.samples = draw(1, 40), s.channels = draw(1, 4);
  s.kernel_h = draw(1, 5), s.kernel_w = draw(1, 5);
  s.stride_h = draw(1, 6), s.stride_w = draw(1, 6);
  s.pad_h = draw(0, s.kernel_h / 2), s.pad_w = draw(0, s.kernel_w / 2);
  s.height = draw(std::max<int64_t>(1, s.kernel_h - 2 * s.pad_h), 12);
  s.width = draw(std::max<int64_t>(1, s.kernel_w - 2 * s.pad_w), 12);
  const bool ceil = draw(0, 1);
  s.out_height = windows(s.height, s.kernel_h, s.stride_h, s.pad_h, ceil);
  s.out_width = windows(s.width, s.kernel_w, s.stride_w, s.pad_w, ceil);
  return s;
}

}  // namespace

int main() {
  for (int i = 0; i < cases(200); ++i)
    test(random_shape(i % 2 ? Dtype::float32 : Dtype::bfloat16));
  std::puts("max_pool: all equal");
}
