// Who does what. A task owns a row of the output, or of the input's gradient, of one
// channel, and the kernels take the samples of one position. Forward, the channels of a
// single sample are transposed: then a task owns some rows of a group of channels, and
// the kernels take the channels of one position, which lie innermost in a buffer.
// Backward, a task owns some channels of it, and adds each gradient to its place.
//
// Memory traffic. Forward reads the input once, from a cache again where windows
// overlap, and writes the output and a byte for each of its entries. Backward reads
// gradient and bytes and writes the input's gradient once. Buffers stay in a cache.
#include "max_pool/cpu/core.h"

#include <algorithm>
#include <array>
#include <memory>
#include <vector>

#include "common/cpu/half_float.h"
#include "common/integers.h"
#include "max_pool/cpu/kernels.h"

namespace fisherprune::cpu::max_pool {
namespace {

constexpr int64_t kGroup = 32;        // channels
constexpr int64_t kBuffer = 1 << 15;  // entries of an image that a task takes

struct Range {
  int64_t first, last;  // not included
  int64_t count() const { return last - first; }
};

struct alignas(64) Line {
  char bytes[64];
};

// A thread's buffers: entries of the input, and of the output, of a group.
struct Buffers {
  Buffers(int64_t inputs, int64_t outputs)
      : input(new Line[ceil_div(inputs * kGroup * 4, sizeof(Line))]),
        output(new Line[ceil_div(outputs * kGroup * 4, sizeof(Line))]),
        index(new Line[ceil_div(outputs * kGroup, sizeof(Line))]) {}

  std::unique_ptr<Line[]> input, output, index;
};

// The places of a window, from `start`, that are within [0, size).
Range inside(int64_t start, int64_t kernel, int64_t size) {
  return {std::max<int64_t>(0, -start), std::min(kernel, size - start)};
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

// Row p of the output. The input begins with its row `first`; lanes lie innermost.
void forward_row(const MaxPoolShape& s, const Kernels& code, int64_t lanes, int64_t p,
                 int64_t first, const void* input, void* output, uint8_t* index) {
  const auto kernel = code.forward[s.dtype == Dtype::bfloat16];
  const int64_t top = p * s.stride_h - s.pad_h;
  const Range y = inside(top, s.kernel_h, s.height);
  const int64_t above = (top + y.first - first) * s.width;
  for (int64_t q = 0; q < s.out_width; ++q) {
    const int64_t left = q * s.stride_w - s.pad_w;
    const Range x = inside(left, s.kernel_w, s.width);
    kernel({shifted(input, (above + left + x.first) * lanes, s.dtype),
            shifted(output, q * lanes, s.dtype), index + q * lanes, lanes, y.count(),
            x.count(), s.width * lanes, y.first * s.kernel_w + x.first, s.kernel_w});
  }
}

// Row h of the input's gradient. Lanes lie innermost.
void backward_row(const MaxPoolShape& s, const Kernels& code, int64_t lanes, int64_t h,
                  const void* grad, const uint8_t* index, void* grad_input) {
  const auto kernel = code.backward[s.dtype == Dtype::bfloat16];
  const int64_t down = h + s.pad_h;
  const Range p = holding(down, s.kernel_h, s.stride_h, s.out_height);
  for (int64_t w = 0; w < s.width; ++w) {
    const int64_t along = w + s.pad_w;
    const Range q = holding(along, s.kernel_w, s.stride_w, s.out_width);
    const int64_t at = (p.first * s.out_width + q.first) * lanes;
    kernel({shifted(grad, at, s.dtype), index + at,
            shifted(grad_input, w * lanes, s.dtype), lanes, p.count(), q.count(),
            s.out_width * lanes,
            (down - p.first * s.stride_h) * s.kernel_w + along - q.first * s.stride_w,
            s.stride_h * s.kernel_w, s.stride_w});
  }
}

// Rows p of the output, of a group of channels from c on.
void forward_group(const MaxPool& pool, const Kernels& code, int64_t c, Range p,
                   const Buffers& own) {
  const MaxPoolShape& s = pool.shape;
  const auto transpose = code.transpose[s.dtype == Dtype::bfloat16];
  const int64_t channels = std::min(kGroup, s.channels - c);
  const int64_t plane = s.height * s.width, out_plane = s.out_height * s.out_width;
  const int64_t first = std::max<int64_t>(0, p.first * s.stride_h - s.pad_h);
  const int64_t last =
      std::min(s.height, (p.last - 1) * s.stride_h - s.pad_h + s.kernel_h);
  transpose({channels, (last - first) * s.width,
             shifted(pool.input, c * plane + first * s.width, s.dtype), plane,
             own.input.get(), kGroup});
  void* const output = own.output.get();
  uint8_t* const index = reinterpret_cast<uint8_t*>(own.index.get());
  for (int64_t row = p.first; row < p.last; ++row) {
    const int64_t at = (row - p.first) * s.out_width * kGroup;
    forward_row(s, code, kGroup, row, first, own.input.get(),
                shifted(output, at, s.dtype), index + at);
  }
  const int64_t to = c * out_plane + p.first * s.out_width;
  const int64_t size = p.count() * s.out_width;
  transpose(
      {size, channels, output, kGroup, shifted(pool.output, to, s.dtype), out_plane});
  code.transpose_bytes({size, channels, index, kGroup, pool.index + to, out_plane});
}

void forward_channels(const MaxPool& pool, const Kernels& code,
                      const Parallel& parallel) {
  const MaxPoolShape& s = pool.shape;
  const int64_t most = kBuffer / (kGroup * s.width);  // rows of the input
  const int64_t rows =
      std::clamp<int64_t>((most - s.kernel_h) / s.stride_h + 1, 1, s.out_height);
  const int64_t read = std::min(s.height, (rows - 1) * s.stride_h + s.kernel_h);
  const int64_t bands = ceil_div(s.out_height, rows);
  for_each_task(
      parallel, ceil_div(s.channels, kGroup) * bands,
      [&] { return Buffers(read * s.width, rows * s.out_width); },
      [&](int64_t task, const Buffers& own) {
        const int64_t first = task % bands * rows;
        forward_group(pool, code, task / bands * kGroup,
                      {first, std::min(s.out_height, first + rows)}, own);
      },
      [](const Buffers&) {});
}

// From the index of a place in a window to its distance from the window's start.
using Distances = std::array<int64_t, 256>;

Distances distances(const MaxPoolShape& s) {
  Distances found{};
  for (int64_t i = 0; i < s.kernel_h * s.kernel_w; ++i)
    found[i] = i / s.kernel_w * s.width + i % s.kernel_w;
  return found;
}

// Adds the gradients of some channels to `sum`.
template <class T>
void add_gradients(const MaxPoolShape& s, const Distances& distance, int64_t channels,
                   const T* grad, const uint8_t* index, float* sum) {
  const int64_t plane = s.height * s.width;
  std::fill(sum, sum + channels * plane, 0.0f);
  for (int64_t c = 0; c < channels; ++c, sum += plane) {
    for (int64_t p = 0; p < s.out_height; ++p) {
      const int64_t start = (p * s.stride_h - s.pad_h) * s.width - s.pad_w;
      for (int64_t q = 0; q < s.out_width; ++q, ++index, ++grad) {
        const int64_t at = start + q * s.stride_w + distance[*index];
        // What forward never gives, a place outside of the image, has no gradient.
        if (static_cast<uint64_t>(at) < static_cast<uint64_t>(plane))
          sum[at] += to_float(*grad);
      }
    }
  }
}

template <class T>
void backward_channels(const MaxPoolBackward& pool, const Parallel& parallel) {
  const MaxPoolShape& s = pool.shape;
  const int64_t plane = s.height * s.width, out_plane = s.out_height * s.out_width;
  const int64_t most = ceil_div(kBuffer, plane);  // channels of a task
  const Distances distance = distances(s);
  const auto work = [&](int64_t task, std::vector<float>& sum) {
    const int64_t c = task * most, channels = std::min(most, s.channels - c);
    const T* const grad = static_cast<const T*>(pool.grad) + c * out_plane;
    const uint8_t* const index = pool.index + c * out_plane;
    T* const to = static_cast<T*>(pool.grad_input) + c * plane;
    if constexpr (std::is_same_v<T, float>) {
      add_gradients(s, distance, channels, grad, index, to);
    } else {
      sum.resize(channels * plane);
      add_gradients(s, distance, channels, grad, index, sum.data());
      std::transform(sum.begin(), sum.end(), to, to_bfloat16);
    }
  };
  for_each_task(
      parallel, ceil_div(s.channels, most), [] { return std::vector<float>(); }, work,
      [](const std::vector<float>&) {});
}

}  // namespace

void forward(const MaxPool& pool, Capability capability, const Parallel& parallel) {
  const MaxPoolShape& s = pool.shape;
  const Kernels& code = kernels(capability);
  if (s.samples == 1) return forward_channels(pool, code, parallel);
  for_each_task(parallel, s.channels * s.out_height, [&](int64_t row) {
    const int64_t above = row / s.out_height * s.height * s.width * s.samples;
    const int64_t at = row * s.out_width * s.samples;
    forward_row(s, code, s.samples, row % s.out_height, 0,
                shifted(pool.input, above, s.dtype), shifted(pool.output, at, s.dtype),
                pool.index + at);
  });
}

void backward(const MaxPoolBackward& pool, Capability capability,
              const Parallel& parallel) {
  const MaxPoolShape& s = pool.shape;
  const Kernels& code = kernels(capability);
  if (s.samples == 1)
    return s.dtype == Dtype::float32 ? backward_channels<float>(pool, parallel)
                                     : backward_channels<BFloat16>(pool, parallel);
  for_each_task(parallel, s.channels * s.height, [&](int64_t row) {
    const int64_t above = row / s.height * s.out_height * s.out_width * s.samples;
    backward_row(s, code, s.samples, row % s.height, shifted(pool.grad, above, s.dtype),
                 pool.index + above,
                 shifted(pool.grad_input, row * s.width * s.samples, s.dtype));
  });
}

}  // namespace fisherprune::cpu::max_pool
