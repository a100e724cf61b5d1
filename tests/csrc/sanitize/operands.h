// Random operands in heap blocks of their exact size, and threads, for the drivers.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "common/cpu/half_float.h"
#include "common/cpu/parallel.h"
#include "common/view.h"

namespace {

using namespace fisherprune;
using namespace fisherprune::cpu;

std::mt19937 generator(20);

int64_t draw(int64_t least, int64_t most) {
  return std::uniform_int_distribution<int64_t>(least, most)(generator);
}

// Bits of values in [-2, 2] that every dtype holds exactly.
uint32_t random_bits(Dtype dtype) {
  const uint32_t sign = draw(0, 1), mantissa = draw(0, 7);
  if (dtype == Dtype::float16) return sign << 15 | 15u << 10 | mantissa << 7;
  const uint32_t bits = sign << 31 | 127u << 23 | mantissa << 20;
  return dtype == Dtype::float32 ? bits : bits >> 16;
}

enum Layout { nchw, nhwc, transposed, gaps, one_channel, one_sample, kLayouts };

// A view of given sizes and the memory behind it.
struct Operand4 {
  std::unique_ptr<char[]> memory;
  View4 view;

  double at(int64_t n, int64_t c, int64_t h, int64_t w) const {
    const int64_t i = n * view.stride[0] + c * view.stride[1] + h * view.stride[2] +
                      w * view.stride[3];
    if (view.dtype == Dtype::float32) return static_cast<const float*>(view.data)[i];
    if (view.dtype == Dtype::float16)
      return to_float(static_cast<const Float16*>(view.data)[i]);
    return to_float(static_cast<const BFloat16*>(view.data)[i]);
  }
};

Operand4 operand(const int64_t (&size)[4], Dtype dtype, Layout layout) {
  Operand4 x{nullptr, {nullptr, dtype, {}}};
  std::vector<int> order{3, 2, 1, 0};  // from the fastest
  if (layout == nhwc) order = {1, 3, 2, 0};
  if (layout == transposed) order = {2, 3, 0, 1};
  int64_t stride = layout == gaps ? 3 : 1;
  int64_t last = 0;
  for (const int i : order) {
    const bool expanded =
        (layout == one_channel && i == 1) || (layout == one_sample && i == 0);
    x.view.stride[i] = expanded ? 0 : stride;
    last += x.view.stride[i] * std::max<int64_t>(size[i] - 1, 0);
    if (!expanded) stride = stride * size[i] + (layout == gaps ? 2 : 0);
  }
  const bool empty = size[0] * size[1] * size[2] * size[3] == 0;
  const int64_t count = empty ? 0 : last + 1;
  const int64_t bytes = dtype == Dtype::float32 ? 4 : 2;
  x.memory.reset(new char[count * bytes]);
  x.view.data = x.memory.get();
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = random_bits(dtype);
    std::memcpy(x.memory.get() + i * bytes, &bits, bytes);
  }
  return x;
}

// Two threads, each with half of the tasks to begin with.
void two_threads(int64_t count, const Body& body) {
  std::thread other(body, 0, count / 2);
  body(count / 2, count);
  other.join();
}

}  // namespace
