// Who does what. A task owns a row of the output, or of the input's gradient, of one
// channel; the kernels take the samples of one position, or of a single sample a row of
// positions whose windows lie within the image's columns.
//
// Memory traffic. Forward reads the input once, from a cache again where windows
// overlap, and writes the output and a byte for each of its entries. Backward reads
// gradient and bytes and writes the input's gradient once.
#include "max_pool/cpu/core.h"

#include <algorithm>

#include "common/integers.h"
#include "max_pool/cpu/kernels.h"

namespace fisherprune::cpu::max_pool {
namespace {

struct Range {
  int64_t first, last;  // not included
};

// The places of a window, from `start`, that are within [0, size).
Range inside(int64_t start, int64_t kernel, int64_t size) {
  return {std::max<int64_t>(0, -start), std::min(kernel, size - start)};
}

// The windows of a row that have no column outside of the image; none: first >= last.
Range within(const MaxPoolShape& s) {
  const int64_t most = s.width + s.pad_w - s.kernel_w;  // where the last one begins
  return {ceil_div(s.pad_w, s.stride_w),
          most < 0 ? 0 : std::min(s.out_width, most / s.stride_w + 1)};
}

// The windows that hold `place`, which counts from the padding's start.
Range holding(int64_t place, int64_t kernel, int64_t stride, int64_t windows) {
  return {place < kernel ? 0 : ceil_div(place - kernel + 1, stride),
          std::min(windows, place / stride + 1)};
}

template <class T>
T* shifted(T* data, int64_t entries, Dtype dtype) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return static_cast<Byte*>(data) + entries * (dtype == Dtype::float32 ? 4 : 2);
}

}  // namespace

void forward(const MaxPool& pool, Capability capability, const Parallel& parallel) {
  const MaxPoolShape& s = pool.shape;
  const auto kernel = kernels(capability).forward[s.dtype == Dtype::bfloat16];
  const Range whole = within(s);
  for_each_task(parallel, s.channels * s.out_height, [&](int64_t row) {
    const int64_t c = row / s.out_height, p = row % s.out_height;
    const int64_t top = p * s.stride_h - s.pad_h;
    const Range y = inside(top, s.kernel_h, s.height);
    for (int64_t q = 0, count; q < s.out_width; q += count) {
      const int64_t left = q * s.stride_w - s.pad_w;
      const Range x = inside(left, s.kernel_w, s.width);
      count =
          s.samples == 1 && q == whole.first ? std::max<int64_t>(1, whole.last - q) : 1;
      const int64_t h = c * s.height + top + y.first, w = left + x.first;
      const int64_t at = (row * s.out_width + q) * s.samples;
      kernel({shifted(pool.input, (h * s.width + w) * s.samples, s.dtype),
              shifted(pool.output, at, s.dtype), pool.index + at, count * s.samples,
              s.samples == 1 ? s.stride_w : 1, y.last - y.first, x.last - x.first,
              s.width * s.samples, s.samples, y.first * s.kernel_w + x.first,
              s.kernel_w});
    }
  });
}

void backward(const MaxPoolBackward& pool, Capability capability,
              const Parallel& parallel) {
  const MaxPoolShape& s = pool.shape;
  const auto kernel = kernels(capability).backward[s.dtype == Dtype::bfloat16];
  for_each_task(parallel, s.channels * s.height, [&](int64_t row) {
    const int64_t c = row / s.height, down = row % s.height + s.pad_h;
    const Range p = holding(down, s.kernel_h, s.stride_h, s.out_height);
    for (int64_t w = 0; w < s.width; ++w) {
      const int64_t along = w + s.pad_w;
      const Range q = holding(along, s.kernel_w, s.stride_w, s.out_width);
      const int64_t first = (c * s.out_height + p.first) * s.out_width + q.first;
      kernel({shifted(pool.grad, first * s.samples, s.dtype),
              pool.index + first * s.samples,
              shifted(pool.grad_input, (row * s.width + w) * s.samples, s.dtype),
              s.samples, p.last - p.first, q.last - q.first, s.out_width * s.samples,
              (down - p.first * s.stride_h) * s.kernel_w + along - q.first * s.stride_w,
              s.stride_h * s.kernel_w, s.stride_w});
    }
  });
}

}  // namespace fisherprune::cpu::max_pool
