// source: csrc/common/cpu/capability.cpp
// source: csrc/max_pool/cpu/kernels.cpp
// source: csrc/max_pool/cpu/core.cpp
//
// Random windows in every dtype and instruction set, compared with a naive loop.
// Operands lie in heap blocks of their exact size: a read or write beyond them is
// reported.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "common/cpu/half_float.h"
#include "max_pool/cpu/core.h"

namespace {

using namespace fisherprune;
using namespace fisherprune::cpu;

std::mt19937 generator(22);

int64_t draw(int64_t least, int64_t most) {
  return std::uniform_int_distribution<int64_t>(least, most)(generator);
}

void two_threads(int64_t count, const Body& body) {
  std::thread other(body, 0, count / 2);
  body(count / 2, count);
  other.join();
}

// Small integers, many of them equal, which both dtypes hold; some NaN.
struct Values {
  Dtype dtype;
  int64_t count;
  std::unique_ptr<char[]> memory;

  Values(Dtype type, int64_t n) : dtype(type), count(n), memory(new char[n * bytes()]) {
    for (int64_t i = 0; i < n; ++i) {
      float value = static_cast<float>(draw(-4, 4));
      if (draw(0, 40) == 0) value = std::numeric_limits<float>::quiet_NaN();
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      if (dtype != Dtype::float32) bits >>= 16;
      std::memcpy(memory.get() + i * bytes(), &bits, bytes());
    }
  }

  int64_t bytes() const { return dtype == Dtype::float32 ? 4 : 2; }
  void* data() const { return memory.get(); }

  float at(int64_t i) const {
    if (dtype == Dtype::float32) return reinterpret_cast<const float*>(memory.get())[i];
    return to_float(reinterpret_cast<const BFloat16*>(memory.get())[i]);
  }
};

bool same(float a, float b) { return a == b || (a != a && b != b); }

[[noreturn]] void fail(const MaxPoolShape& s, const char* what) {
  std::printf(
      "wrong %s: N %ld C %ld H %ld W %ld P %ld Q %ld kernel %ld %ld stride %ld "
      "%ld pad %ld %ld dtype %d\n",
      what, long(s.samples), long(s.channels), long(s.height), long(s.width),
      long(s.out_height), long(s.out_width), long(s.kernel_h), long(s.kernel_w),
      long(s.stride_h), long(s.stride_w), long(s.pad_h), long(s.pad_w), int(s.dtype));
  std::exit(1);
}

// Compares one entry of the output, and adds its gradient where it belongs.
void compare(const MaxPoolShape& s, const Values& x, const Values& y,
             const uint8_t* index, const Values& grad, std::vector<float>& sums,
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
  const Values x(s.dtype, in), grad(s.dtype, out);
  for (const Capability capability :
       {Capability::portable, Capability::avx2, Capability::avx512}) {
    if (capability > cpu_capability()) continue;
    const Values y(s.dtype, out), grad_input(s.dtype, in);
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
  for (int i = 0; i < 200; ++i)
    test(random_shape(i % 2 ? Dtype::float32 : Dtype::bfloat16));
  std::puts("max_pool: all equal");
}
