// global_topk: from thresholds to masks.
//
// Where some of the scores equal to a threshold are left out, one more pass counts
// them, chunk by chunk, and its last block finds the chunk in which the kept ones end.
//
// Memory traffic: 4 bytes a score and pass, 1 byte a score and selection for its mask,
// 2 bytes a chunk and selection for the ties.
#pragma once

#include "global_topk/cuda/kernel.cuh"

namespace fisherprune::cuda::global_topk {

// Where the kept scores among those equal to a threshold end: earlier chunks keep all
// of theirs, this one keeps its first `left`, later ones keep none.
struct Cut {
  int64_t chunk, left;
};

// How many of the scores equal to a threshold are kept: a number for each selection,
// or, for one selection, a number for each tensor, which is in the table.
struct TieRule {
  const Selection* selections;
  int n;
  bool per_tensor;
};

__device__ inline bool keeps_all_ties(const Selection& selection) {
  return selection.left == selection.equal;
}

__device__ inline bool cuts_ties(const TieRule& rule) {
  bool any = false;
  for (int k = 0; k < rule.n; ++k) any = any || !keeps_all_ties(rule.selections[k]);
  return any;
}

// Adds to counts[k] how many of the batch's scores equal the k-th threshold.
template <bool whole>
__device__ inline void count_equal(const Batch<whole>& batch, const TieRule& rule,
                                   unsigned* counts) {
  const Keys keys(batch);
#pragma unroll 1
  for (int k = 0; k < rule.n; ++k) {
    if (keeps_all_ties(rule.selections[k])) continue;
    const uint32_t threshold = static_cast<uint32_t>(rule.selections[k].prefix);
    unsigned equal = 0;
#pragma unroll
    for (int q = 0; q < QUADS; ++q)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        equal += batch.exists(q, i) && keys.key[q][i] == threshold;
    equal = __reduce_add_sync(ALL_LANES, equal);
    if (threadIdx.x % 32 == 0 && equal) atomicAdd(&counts[k], equal);
  }
}

// A block finds the cut of one selection, or of one tensor.
__device__ inline void find_cut(const ScoreTable& table, const TieRule& rule, int64_t i,
                                const uint16_t* ties, Cut* cut, int64_t* shared) {
  int64_t first = 0, last = table.chunks, left;
  if (rule.per_tensor) {
    first = table.entry[i].first_chunk, left = table.entry[i].ties;
    if (i + 1 < table.tensors) last = table.entry[i + 1].first_chunk;
  } else {
    const Selection& selection = rule.selections[i];
    if (keeps_all_ties(selection)) return;
    ties += i * table.chunks, left = selection.left;
  }
  const Place place = find_place(
      last - first, left,
      [&](int64_t at) { return static_cast<int64_t>(__ldcg(ties + first + at)); },
      shared);
  if (threadIdx.x == 0) *cut = {first + place.at, left - place.before};
}

constexpr size_t TIES_BYTES = SEARCH_BYTES + 2 * TOPK_KEEPS * sizeof(unsigned);

// Each block counts, for its chunks, the scores equal to each threshold, as
// ties[k][chunk]; the last block finds the cuts. It reads every score once, but nothing
// where no ties are left out. The counts of a chunk are stored while those of the next
// chunk are added.
__global__ void __launch_bounds__(TOPK_THREADS, TOPK_BLOCKS)
    topk_count_ties_kernel(ScoreTable table, TieRule rule, uint16_t* ties, Cut* cuts,
                           unsigned long long* ticket) {
  if (!cuts_ties(rule)) return;
  int64_t* shared = reinterpret_cast<int64_t*>(dynamic_shared());
  unsigned* counts = reinterpret_cast<unsigned*>(dynamic_shared() + SEARCH_BYTES);
  const int me = static_cast<int>(threadIdx.x);
  if (me < 2 * TOPK_KEEPS) counts[me] = 0;
  __syncthreads();
  for (int64_t c = blockIdx.x, turn = 0; c < table.chunks; c += gridDim.x, ++turn) {
    unsigned* now = counts + turn % 2 * TOPK_KEEPS;
    for_each_batch(chunk_at(table, c),
                   [&](const auto& batch, int) { count_equal(batch, rule, now); });
    __syncthreads();
    if (me >= rule.n) continue;
    ties[me * table.chunks + c] = static_cast<uint16_t>(now[me]);
    now[me] = 0;
  }
  if (!is_last_block(ticket, shared)) return;
  const int64_t searches = rule.per_tensor ? table.tensors : rule.n;
  for (int64_t i = 0; i < searches; ++i)
    find_cut(table, rule, i, ties, cuts + i, shared);
}

__device__ inline Cut cut_of(const TieRule& rule, const Cut* cuts, int k,
                             int64_t tensor) {
  if (rule.per_tensor) return cuts[tensor];
  if (keeps_all_ties(rule.selections[k])) return {INT64_MAX, 0};
  return cuts[k];
}

__device__ inline void store_quad(bool* mask, const bool (&kept)[4], int count) {
  if (count >= 4) {
    __stcs(reinterpret_cast<uchar4*>(mask),
           make_uchar4(kept[0], kept[1], kept[2], kept[3]));
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < count) mask[i] = kept[i];
}

// Masks a chunk that keeps all of its ties or none: it keeps the keys from `least` on.
template <bool whole>
__device__ inline void mask_from(const Batch<whole>& batch, const Keys& keys,
                                 uint32_t least, bool* mask) {
#pragma unroll
  for (int q = 0; q < QUADS; ++q) {
    bool kept[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) kept[i] = keys.key[q][i] >= least;
    store_quad(mask + q * QUAD_STEP, kept, whole ? 4 : batch.left - q * QUAD_STEP);
  }
}

// Masks the chunk in which the kept ties end: ties are numbered in order, a quad of
// each thread at a time. There are few such chunks.
__device__ inline void mask_first_ties(const Chunk& chunk, uint32_t threshold,
                                       int64_t left, bool* mask, int64_t* shared) {
  const bool aligned = is_aligned(chunk);
#pragma unroll 1
  for (int first = 0; first < chunk.size; first += QUAD_STEP) {
    const int at = first + 4 * static_cast<int>(threadIdx.x), here = chunk.size - at;
    float value[4];
    load_some(value, chunk.data + at, here, aligned);
    bool kept[4];
    int64_t equal = 0, total;
#pragma unroll
    for (int i = 0; i < 4; ++i) equal += i < here && key_of(value[i]) == threshold;
    int64_t rank = sum_before(equal, shared, &total);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t key = key_of(value[i]);
      kept[i] = key > threshold || (key == threshold && rank++ < left);
    }
    left -= total;
    store_quad(mask + at, kept, here);
  }
}

// Each block writes the masks of its chunks, for all selections while it holds the
// scores, and those of the chunk of a cut again. It reads every score once, and writes
// a byte for each score and selection.
__global__ void __launch_bounds__(TOPK_THREADS, TOPK_BLOCKS)
    topk_mask_kernel(ScoreTable table, TieRule rule, const Cut* cuts,
                     bool* const* masks) {
  int64_t* shared = reinterpret_cast<int64_t*>(dynamic_shared());
  for (int64_t c = blockIdx.x; c < table.chunks; c += gridDim.x) {
    const Chunk chunk = chunk_at(table, c);
    bool* const* mask = masks + chunk.tensor;
    for_each_batch(chunk, [&](const auto& batch, int at) {
      const Keys keys(batch);
#pragma unroll 1
      for (int k = 0; k < rule.n; ++k) {
        const Cut cut = cut_of(rule, cuts, k, chunk.tensor);
        const uint32_t threshold = static_cast<uint32_t>(rule.selections[k].prefix);
        mask_from(batch, keys, threshold + (c >= cut.chunk),
                  mask[k * table.tensors] + chunk.start + at);
      }
    });
    for (int k = 0; k < rule.n; ++k) {
      const Cut cut = cut_of(rule, cuts, k, chunk.tensor);
      if (c == cut.chunk && cut.left > 0)
        mask_first_ties(chunk, static_cast<uint32_t>(rule.selections[k].prefix),
                        cut.left, mask[k * table.tensors] + chunk.start, shared);
    }
  }
}

}  // namespace fisherprune::cuda::global_topk
