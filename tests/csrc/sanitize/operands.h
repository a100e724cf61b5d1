// Random operands of four axes in every layout.
#pragma once

#include <algorithm>

#include "driver.h"

// Bits of values in [-2, 2] that every dtype holds exactly.
inline uint32_t random_bits(Dtype dtype) {
  const uint32_t sign = draw(0, 1), mantissa = draw(0, 7);
  if (dtype == Dtype::float16) return sign << 15 | 15u << 10 | mantissa << 7;
  const uint32_t bits = sign << 31 | 127u << 23 | mantissa << 20;
  return dtype == Dtype::float32 ? bits : bits >> 16;
}

enum Layout { nchw, nhwc, transposed, gaps, one_channel, one_sample, kLayouts };

inline Layout any_layout() { return static_cast<Layout>(draw(0, kLayouts - 1)); }
inline Dtype any_dtype() { return static_cast<Dtype>(draw(0, 2)); }

// A view of given sizes and the memory behind it.
struct Operand4 {
  Entries entries;
  View4 view;

  double at(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return entries.at(n * view.stride[0] + c * view.stride[1] + h * view.stride[2] +
                      w * view.stride[3]);
  }
};

inline Operand4 operand(const int64_t (&size)[4], Dtype dtype, Layout layout) {
  View4 view{nullptr, dtype, {}};
  std::vector<int> order{3, 2, 1, 0};  // from the fastest
  if (layout == nhwc) order = {1, 3, 2, 0};
  if (layout == transposed) order = {2, 3, 0, 1};
  int64_t stride = layout == gaps ? 3 : 1;
  int64_t last = 0;
  for (const int i : order) {
    const bool expanded =
        (layout == one_channel && i == 1) || (layout == one_sample && i == 0);
    view.stride[i] = expanded ? 0 : stride;
    last += view.stride[i] * std::max<int64_t>(size[i] - 1, 0);
    if (!expanded) stride = stride * size[i] + (layout == gaps ? 2 : 0);
  }
  const bool empty = size[0] * size[1] * size[2] * size[3] == 0;
  Entries entries(dtype, empty ? 0 : last + 1);
  for (int64_t i = 0; i < entries.count; ++i) entries.set_bits(i, random_bits(dtype));
  view.data = entries.data();
  return {std::move(entries), view};
}
