// global_topk: radix selection over many score tensors in place.
//
// A block takes chunks of 8192 scores, wherever they lie. Passes over the scores: three
// histograms of 11, 11 and 10 bits of the keys that match what the digits before have
// decided, each followed by a decision of one block a selection; then the masks. Only
// where not all scores equal to a threshold are kept, one more pass counts them chunk
// by chunk and a scan over the chunks finds the one in which they run out.
//
// Memory traffic: 4 bytes a score and pass, 1 byte a score and selection for its mask.
// Atomic additions are of integers only, so the results do not depend on their order.
#pragma once

#include "global_topk_scores.cuh"

namespace fisherprune {

// What is known of a selection: the first bits of its threshold's key.
struct Selection {
  int64_t keep;
  int64_t left;   // of those that match the prefix, how many are kept
  int64_t equal;  // how many match the prefix
  uint64_t prefix;
};

struct Digit {
  int prefix_bits, bits;
};

// Adds one in shared memory, where the hardware itself joins lanes with equal bins.
__device__ inline void count_one(bool active, uint32_t bin, uint32_t* counts) {
  if (active) atomicAdd(&counts[bin], 1u);
}

// Adds the warp's active lanes in global memory, each bin once, so that equal scores
// cost no more than different ones.
__device__ inline void count_one(bool active, uint32_t bin,
                                 unsigned long long* counts) {
  constexpr unsigned all = 0xffffffffu;
  if (__ballot_sync(all, active) == 0) return;
  const unsigned same = __match_any_sync(all, active ? bin : ~0u);
  const int lane = threadIdx.x % 32;
  if (active && lane == __ffs(same) - 1)
    atomicAdd(&counts[bin], static_cast<unsigned long long>(__popc(same)));
}

__device__ inline bool is_nonfinite(float value) {
  return (__float_as_uint(value) & 0x7f800000u) == 0x7f800000u;
}

__device__ inline void count_nonfinite(const Chunk& chunk, unsigned long long* counts) {
  int bad = 0;
  for_each_quad(chunk, [&](const Quad& quad, int) {
#pragma unroll
    for (int i = 0; i < 4; ++i) bad += i < quad.count && is_nonfinite(quad.value[i]);
  });
  if (bad) atomicAdd(&counts[chunk.tensor], static_cast<unsigned long long>(bad));
}

// The digit's histogram for each of n prefixes, one after the other. A block's share of
// the scores is far below 2^32.
template <class Count>
__device__ inline void count_digits(const Chunk& chunk, const Selection* selections,
                                    int n, Digit digit, Count* counts) {
  const uint32_t mask = static_cast<uint32_t>((uint64_t{1} << digit.bits) - 1);
  const int after_prefix = 32 - digit.prefix_bits;
  for_each_quad(chunk, [&](const Quad& quad, int) {
    for (int k = 0; k < n; ++k) {
      const uint64_t prefix = selections[k].prefix;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint64_t key = key_of(quad.value[i]);
        const uint32_t bin = static_cast<uint32_t>(key >> (after_prefix - digit.bits));
        count_one(i < quad.count && key >> after_prefix == prefix, bin & mask,
                  counts + (int64_t{k} << digit.bits));
      }
    }
  });
}

__global__ void __launch_bounds__(TOPK_THREADS, TOPK_BLOCKS)
    topk_histogram_kernel(ScoreTable table, const Selection* selections, int n,
                          Digit digit, unsigned long long* totals,
                          unsigned long long* nonfinite) {
  uint32_t* counts = reinterpret_cast<uint32_t*>(dynamic_shared());
  const int bins = n << digit.bits;
  for (int i = threadIdx.x; i < bins; i += TOPK_THREADS) counts[i] = 0;
  __syncthreads();
  for (int64_t c = blockIdx.x; c < table.chunks; c += gridDim.x) {
    const Chunk chunk = chunk_at(table, c);
    if (nonfinite) count_nonfinite(chunk, nonfinite);
    count_digits(chunk, selections, n, digit, counts);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < bins; i += TOPK_THREADS)
    if (counts[i]) atomicAdd(&totals[i], static_cast<unsigned long long>(counts[i]));
}

// The same for digits too long for shared memory.
__global__ void __launch_bounds__(TOPK_THREADS, TOPK_BLOCKS)
    topk_long_histogram_kernel(ScoreTable table, const Selection* selection,
                               Digit digit, unsigned long long* totals) {
  for (int64_t c = blockIdx.x; c < table.chunks; c += gridDim.x)
    count_digits(chunk_at(table, c), selection, 1, digit, totals);
}

// Sum of `mine` over the threads before this one; *total gets that over all.
__device__ inline int64_t sum_before(int64_t mine, int64_t* shared, int64_t* total) {
  shared[threadIdx.x] = mine;
  __syncthreads();
  for (int step = 1; step < TOPK_THREADS; step *= 2) {
    const int64_t other =
        static_cast<int>(threadIdx.x) >= step ? shared[threadIdx.x - step] : 0;
    __syncthreads();
    shared[threadIdx.x] += other;
    __syncthreads();
  }
  const int64_t through = shared[threadIdx.x];
  *total = shared[TOPK_THREADS - 1];
  __syncthreads();
  return through - mine;
}

// One block a selection: finds the digit of its threshold. Threads share the bins in
// falling order; the one in which the kept scores run out writes.
__global__ void __launch_bounds__(TOPK_THREADS)
    topk_decide_kernel(Selection* selections, const unsigned long long* totals,
                       int64_t stride, Digit digit, float* thresholds) {
  int64_t* shared = reinterpret_cast<int64_t*>(dynamic_shared());
  const unsigned long long* counts = totals + blockIdx.x * stride;
  Selection* selection = selections + blockIdx.x;
  const int bins = 1 << digit.bits, share = bins / TOPK_THREADS;
  const int top = bins - 1 - static_cast<int>(threadIdx.x) * share;
  int64_t mine = 0, total;
  for (int i = 0; i < share; ++i) mine += counts[top - i];
  const Selection before = *selection;
  int64_t above = sum_before(mine, shared, &total);  // and all have read `before`
  const bool last = digit.prefix_bits + digit.bits == 32;
  if (before.keep == 0) {
    const uint64_t infinity = key_of(__uint_as_float(0x7f800000u));
    if (threadIdx.x == 0) {
      *selection = {0, 0, 0, infinity >> (32 - digit.prefix_bits - digit.bits)};
      if (last) thresholds[blockIdx.x] = value_of(static_cast<uint32_t>(infinity));
    }
  } else if (above < before.left && before.left <= above + mine) {
    int bin = top;
    while (above + static_cast<int64_t>(counts[bin]) < before.left)
      above += counts[bin--];
    const uint64_t prefix = before.prefix << digit.bits | static_cast<uint32_t>(bin);
    *selection = {before.keep, before.left - above, static_cast<int64_t>(counts[bin]),
                  prefix};
    if (last) thresholds[blockIdx.x] = value_of(static_cast<uint32_t>(prefix));
  }
}

__device__ inline bool keeps_all_ties(const Selection& selection) {
  return selection.left == selection.equal;
}

// Scores of each chunk that equal the threshold: ties[k][chunk].
__global__ void __launch_bounds__(TOPK_THREADS, TOPK_BLOCKS)
    topk_count_ties_kernel(ScoreTable table, const Selection* selections, int n,
                           int64_t* ties) {
  int64_t* shared = reinterpret_cast<int64_t*>(dynamic_shared());
  for (int k = 0; k < n; ++k) {
    if (keeps_all_ties(selections[k])) continue;
    const uint32_t threshold = static_cast<uint32_t>(selections[k].prefix);
    for (int64_t c = blockIdx.x; c < table.chunks; c += gridDim.x) {
      int64_t equal = 0, total;
      for_each_quad(chunk_at(table, c), [&](const Quad& quad, int) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          equal += i < quad.count && key_of(quad.value[i]) == threshold;
      });
      sum_before(equal, shared, &total);
      if (threadIdx.x == 0) ties[k * (table.chunks + 1) + c] = total;
    }
  }
}

// One block a selection: ties[k][chunk] becomes the number in the chunks before, with
// that of all chunks at the end.
__global__ void __launch_bounds__(TOPK_THREADS)
    topk_scan_ties_kernel(const Selection* selections, int64_t chunks, int64_t* ties) {
  int64_t* shared = reinterpret_cast<int64_t*>(dynamic_shared());
  if (keeps_all_ties(selections[blockIdx.x])) return;
  int64_t* mine = ties + blockIdx.x * (chunks + 1);
  int64_t before = 0;
  for (int64_t first = 0; first < chunks; first += TOPK_THREADS) {
    const int64_t at = first + threadIdx.x;
    int64_t total;
    const int64_t here = sum_before(at < chunks ? mine[at] : 0, shared, &total);
    if (at < chunks) mine[at] = before + here;
    before += total;
  }
  if (threadIdx.x == 0) mine[chunks] = before;
}

// What a chunk keeps of the scores that equal the threshold.
enum class Ties { all, none, first };

struct ChunkCut {
  Ties ties;
  int64_t first;
  uint32_t threshold;
};

// `ties` counts what lies before each chunk; with `per_tensor` each tensor keeps its
// own number of them.
__device__ inline ChunkCut cut_of(const ScoreTable& table, const Selection& selection,
                                  const int64_t* ties, int64_t chunk, int64_t tensor,
                                  bool per_tensor) {
  const uint32_t threshold = static_cast<uint32_t>(selection.prefix);
  if (!per_tensor && keeps_all_ties(selection)) return {Ties::all, 0, threshold};
  const ScoreEntry& entry = table.entry[tensor];
  const int64_t before = ties[chunk] - (per_tensor ? ties[entry.first_chunk] : 0);
  const int64_t left = (per_tensor ? entry.ties : selection.left) - before;
  if (left <= 0) return {Ties::none, 0, threshold};
  if (left >= ties[chunk + 1] - ties[chunk]) return {Ties::all, 0, threshold};
  return {Ties::first, left, threshold};
}

__device__ inline void store_quad(bool* mask, const bool (&kept)[4], int count) {
  if (count == 4) {
    __stcs(reinterpret_cast<uchar4*>(mask),
           make_uchar4(kept[0], kept[1], kept[2], kept[3]));
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < count) mask[i] = kept[i];
}

__device__ inline void mask_chunk(const Chunk& chunk, const ChunkCut& cut, bool* mask) {
  const bool ties = cut.ties == Ties::all;
  for_each_quad(chunk, [&](const Quad& quad, int at) {
    bool kept[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t key = key_of(quad.value[i]);
      kept[i] = key > cut.threshold || (ties && key == cut.threshold);
    }
    store_quad(mask + at, kept, quad.count);
  });
}

// The chunk in which the ties run out: they are numbered in order.
__device__ inline void mask_first_ties(const Chunk& chunk, const ChunkCut& cut,
                                       bool* mask, int64_t* shared) {
  int64_t left = cut.first;
  for_each_quad(chunk, [&](const Quad& quad, int at) {
    bool kept[4];
    int64_t equal = 0, total;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      equal += i < quad.count && key_of(quad.value[i]) == cut.threshold;
    int64_t rank = sum_before(equal, shared, &total);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t key = key_of(quad.value[i]);
      kept[i] = key > cut.threshold || (key == cut.threshold && rank++ < left);
    }
    left -= total;
    store_quad(mask + at, kept, quad.count);
  });
}

__global__ void __launch_bounds__(TOPK_THREADS, TOPK_BLOCKS)
    topk_mask_kernel(ScoreTable table, const Selection* selections, int n,
                     const int64_t* ties, bool* const* masks, bool per_tensor) {
  int64_t* shared = reinterpret_cast<int64_t*>(dynamic_shared());
  for (int64_t c = blockIdx.x; c < table.chunks; c += gridDim.x) {
    const Chunk chunk = chunk_at(table, c);
    for (int k = 0; k < n; ++k) {
      const ChunkCut cut = cut_of(table, selections[k], ties + k * (table.chunks + 1),
                                  c, chunk.tensor, per_tensor);
      bool* mask = masks[k * table.tensors + chunk.tensor] + chunk.start;
      if (cut.ties == Ties::first)
        mask_first_ties(chunk, cut, mask, shared);
      else
        mask_chunk(chunk, cut, mask);
    }
  }
}

}  // namespace fisherprune
