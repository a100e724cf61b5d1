// lstm and its gradient: the steps of one layer and direction, free of torch.
//
//     [i, f, g, o] = [s, s, tanh, s](ih[n, t] + W_hh h[n, t - 1] + bias),  s(x) the
//     sigmoid;  c[n, t] = f * c[n, t - 1] + i * g;  h[n, t] = o * tanh(c[n, t])
//
// of samples n and steps t, with the products of the inputs, ih, computed before. All
// tensors are contiguous float32. The states have the one before the first step in
// front.
#pragma once

#include <cstdint>

namespace fisherprune {

struct LstmShape {
  int64_t samples, steps, width;  // N, T, H
};

struct Lstm {
  LstmShape shape;
  const float *ih, *h0, *c0;   // [N, T, 4H], [N, H], [N, H]
  const float *weight, *bias;  // [4H, H], [4H] or null
  float *hidden, *cells;       // [N, T + 1, H]
  float *gates, *tanh;         // [N, T, 4H], and of the cells [N, T, H]
};

// From the gradients of all h and of the last c to that of what the gates are computed
// of, and of the first states.
struct LstmBackward {
  LstmShape shape;
  const float *grad, *last;                    // [N, T, H], [N, H]
  const float *weight, *cells, *gates, *tanh;  // as above
  float *delta, *grad_h0, *grad_c0;            // [N, T, 4H], [N, H], [N, H]
};

}  // namespace fisherprune
