// What the threads of a block do together in the top-k kernels: sums, a search in a
// list of counts, and to find out whether theirs is the last block.
#pragma once

#include "common/integers.h"
#include "global_topk/cuda/scores.cuh"

namespace fisherprune::cuda::global_topk {

constexpr int TOPK_WARPS = TOPK_THREADS / 32;

// Returns the sum of `mine` over the threads before this one; *total gets the sum over
// all threads. Warps sum by shuffles, and exchange their sums in TOPK_WARPS words of
// shared memory.
__device__ inline int64_t sum_before(int64_t mine, int64_t* shared, int64_t* total) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  int64_t through = mine;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int64_t other = __shfl_up_sync(ALL_LANES, through, step);
    if (lane >= step) through += other;
  }
  if (lane == 31) shared[warp] = through;
  __syncthreads();
  int64_t before = 0;
  *total = 0;
#pragma unroll
  for (int i = 0; i < TOPK_WARPS; ++i) {
    if (i < warp) before += shared[i];
    *total += shared[i];
  }
  __syncthreads();
  return before + through - mine;
}

// A place in a list of counts, the sum of those before it, and its own.
struct Place {
  int64_t at, before, here;
};

constexpr size_t SEARCH_BYTES = (TOPK_WARPS + 3) * sizeof(int64_t);

// Finds the first of count_at(0), ..., count_at(size - 1) with which their sum reaches
// `left`: the end where it never does, the start where `left` is 0. Each thread adds up
// an equal share; then the threads divide the share in which the sum reaches `left`.
template <class CountAt>
__device__ inline Place find_place(int64_t size, int64_t left, CountAt count_at,
                                   int64_t* shared) {
  Place place{0, 0, 0};
  if (left <= 0) return place;
  int64_t* found = shared + TOPK_WARPS;
  for (int64_t end = size;;) {
    const int64_t share = ceil_div(end - place.at, TOPK_THREADS);
    const int64_t from = place.at + threadIdx.x * share;
    const int64_t to = from + share < end ? from + share : end;
    int64_t mine = 0, total;
#pragma unroll 8
    for (int64_t i = from; i < to; ++i) mine += count_at(i);
    const int64_t before = place.before + sum_before(mine, shared, &total);
    if (place.before + total < left) return {size, place.before + total, 0};
    if (before < left && left <= before + mine)
      found[0] = from, found[1] = before, found[2] = mine;
    __syncthreads();
    place = {found[0], found[1], found[2]};
    __syncthreads();
    if (share == 1) return place;
    end = place.at + share < end ? place.at + share : end;
  }
}

// Whether all other blocks have been here before. If so, this one can read what they
// wrote, past the first-level cache. `ticket` starts at zero.
__device__ inline bool is_last_block(unsigned long long* ticket, int64_t* shared) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) shared[0] = atomicAdd(ticket, 1ull) + 1 == gridDim.x;
  __syncthreads();
  const bool last = shared[0];
  __syncthreads();
  __threadfence();
  return last;
}

}  // namespace fisherprune::cuda::global_topk
