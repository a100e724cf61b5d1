// A thread's share of a tile of the weight gradient: registers for the gradient of the
// open group, for the sum over groups and for the sum of squares; and the products of
// the tensor cores that compute the first.
#pragma once

#include "grad_moments/cuda/load.cuh"
#include "grad_moments/cuda/tuning.h"

namespace fisherprune::cuda::grad_moments {

// How operands are multiplied.
enum class Products {
  rounded,  // to TF32
  split,    // in two TF32s each, for float32 precision
  whole     // 16 bits, which a TF32 holds; sums in float32 precision
};

// What a thread holds of its warp's tile, in the layout of the products.
template <class Tile>
struct Moments {
  using Values = float[Tile::products_m][Tile::products_n][4];
  Values group, sum, sum_sq;
};

template <class Tile, class Action>
__device__ inline void for_each_value(Action action) {
#pragma unroll
  for (int i = 0; i < Tile::products_m; ++i)
#pragma unroll
    for (int j = 0; j < Tile::products_n; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) action(i, j, e);
}

// The warp's rows of a slab: each thread has 4 positions of some rows.
template <class Tile>
struct Fragments {
  float4 grad[Tile::products_m][2], input[Tile::products_n];
};

template <class Tile>
__device__ inline Fragments<Tile> read_fragments(const float* slab) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float* mine = slab + place(lane / 4, lane % 4 * 4);
  const float* grad = mine + warp / Tile::warps_n * (Tile::products_m * 16) * SLAB;
  const float* input =
      mine + (Tile::rows + warp % Tile::warps_n * (Tile::products_n * 8)) * SLAB;
  Fragments<Tile> read;
#pragma unroll
  for (int i = 0; i < Tile::products_m; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      read.grad[i][half] =
          *reinterpret_cast<const float4*>(grad + (i * 16 + half * 8) * SLAB);
#pragma unroll
  for (int j = 0; j < Tile::products_n; ++j)
    read.input[j] = *reinterpret_cast<const float4*>(input + j * 8 * SLAB);
  return read;
}

// A float32 as the sum of two TF32s, which together have 21 bits. The last 13 bits of a
// TF32 may hold anything: the product ignores them, so the subtraction must, too.
struct Split {
  uint32_t high, low;

  __device__ explicit Split(float value) : high(to_tf32(value) & ~0x1fffu) {
    low = to_tf32(value - __uint_as_float(high));
  }
};

// Products of operands as they are, or of TF32s.
template <Dtype dtype>
__device__ inline void multiply_values(float (&c)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2]) {
  if constexpr (dtype == Dtype::float16)
    multiply_float16(c, a, b);
  else if constexpr (dtype == Dtype::bfloat16)
    multiply_bfloat16(c, a, b);
  else
    multiply_tf32(c, a, b);
}

// Rounds float32 to TF32; what was 16 bits needs no rounding.
template <Dtype dtype, int words>
__device__ inline void round_operand(uint32_t (&operand)[words]) {
  if constexpr (dtype == Dtype::float32) {
#pragma unroll
    for (uint32_t& word : operand) word = to_tf32(__uint_as_float(word));
  }
}

// A group's gradient begins with its first product: nothing is cleared before.
template <bool first, int a_words, int b_words>
__device__ inline void multiply_into(float (&group)[4], const uint32_t (&a)[a_words],
                                     const uint32_t (&b)[b_words]) {
  if constexpr (first) group[0] = group[1] = group[2] = group[3] = 0.f;
  multiply_tf32(group, a, b);
}

template <bool first, Dtype dtype>
__device__ inline void multiply_into(float (&group)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
  if constexpr (first) group[0] = group[1] = group[2] = group[3] = 0.f;
  multiply_values<dtype>(group, a, b);
}

// Multiplies 8 positions: the first two of each quad, or the last two.
template <class Tile, bool first>
__device__ inline void multiply(Moments<Tile>& moments, const Fragments<Tile>& read,
                                bool last) {
  uint32_t a[Tile::products_m][4];
#pragma unroll
  for (int i = 0; i < Tile::products_m; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 quad = read.grad[i][half];
      a[i][half] = to_tf32(last ? quad.z : quad.x);
      a[i][half + 2] = to_tf32(last ? quad.w : quad.y);
    }
#pragma unroll
  for (int j = 0; j < Tile::products_n; ++j) {
    const float4 quad = read.input[j];
    const uint32_t b[2] = {to_tf32(last ? quad.z : quad.x),
                           to_tf32(last ? quad.w : quad.y)};
#pragma unroll
    for (int i = 0; i < Tile::products_m; ++i)
      multiply_into<first>(moments.group[i][j], a[i], b);
  }
}

// The same in float32 precision: high x high + high x low + low x high. Whole operands
// have only the first of these. Tensor cores cut off low bits of their sums; so they
// add 8 positions only, and the rest is added outside of them.
template <class Tile, Products products, bool first>
__device__ inline void multiply_exactly(Moments<Tile>& moments,
                                        const Fragments<Tile>& read, bool last) {
  uint32_t high[Tile::products_m][4], low[Tile::products_m][4];
#pragma unroll
  for (int i = 0; i < Tile::products_m; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float4 quad = read.grad[i][e % 2];
      const Split split(e < 2 ? (last ? quad.z : quad.x) : (last ? quad.w : quad.y));
      high[i][e] = split.high;
      low[i][e] = split.low;
    }
#pragma unroll
  for (int j = 0; j < Tile::products_n; ++j) {
    const float4 quad = read.input[j];
    const Split one(last ? quad.z : quad.x), other(last ? quad.w : quad.y);
    const uint32_t b_high[2] = {one.high, other.high};
    const uint32_t b_low[2] = {one.low, other.low};
#pragma unroll
    for (int i = 0; i < Tile::products_m; ++i) {
      float c[4] = {0.f, 0.f, 0.f, 0.f};
      if constexpr (products == Products::split) {
        multiply_tf32(c, low[i], b_high);
        multiply_tf32(c, high[i], b_low);
      }
      multiply_tf32(c, high[i], b_high);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        moments.group[i][j][e] = first ? c[e] : moments.group[i][j][e] + c[e];
    }
  }
}

template <class Tile, Products products, bool first>
__device__ inline void multiply_half(Moments<Tile>& moments,
                                     const Fragments<Tile>& read, bool last) {
  if constexpr (products == Products::rounded)
    multiply<Tile, first>(moments, read, last);
  else
    multiply_exactly<Tile, products, first>(moments, read, last);
}

// One half of a slab. `first`: of the group.
template <class Tile, Products products>
__device__ inline void multiply_half(Moments<Tile>& moments,
                                     const Fragments<Tile>& read, bool last,
                                     bool first) {
  if (first)
    multiply_half<Tile, products, true>(moments, read, last);
  else
    multiply_half<Tile, products, false>(moments, read, last);
}

// `first`: of the group.
template <class Tile, Products products>
__device__ inline void multiply_slab(Moments<Tile>& moments, const float* slab,
                                     bool first) {
  __syncwarp();  // a product takes the whole warp; loads may have split it
  const Fragments<Tile> read = read_fragments<Tile>(slab);
  multiply_half<Tile, products>(moments, read, false, first);
  multiply_half<Tile, products, false>(moments, read, true);
}

// Adds the group's gradient and its square. A last group of fewer samples is brought to
// the scale of the others first.
template <class Tile>
__device__ inline void close_group(Moments<Tile>& moments, int samples,
                                   int group_size) {
  if (samples != group_size) {
    const float ratio = static_cast<float>(group_size) / static_cast<float>(samples);
    for_each_value<Tile>([&](int i, int j, int e) { moments.group[i][j][e] *= ratio; });
  }
  for_each_value<Tile>([&](int i, int j, int e) {
    const float g = moments.group[i][j][e];
    moments.sum[i][j][e] += g;
    moments.sum_sq[i][j][e] = fmaf(g, g, moments.sum_sq[i][j][e]);
  });
}

}  // namespace fisherprune::cuda::grad_moments
