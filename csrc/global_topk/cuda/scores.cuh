// Score tensors as the top-k kernels see them: a table in device memory, chunks that
// each lie in one tensor, and 16 scores of a thread at a time.
#pragma once

#include "common/cuda/launch.cuh"
#include "global_topk/contract.h"
#include "global_topk/cuda/tuning.h"

namespace fisherprune::cuda::global_topk {

constexpr unsigned ALL_LANES = 0xffffffffu;

struct ScoreEntry {
  const float* data;
  int64_t size;
  int64_t first_chunk;
  int64_t ties;  // to keep in this tensor, where that is given
};

// The tensors' entries, in device memory.
struct ScoreTable {
  const ScoreEntry* entry;
  int64_t tensors, chunks;
};

struct Chunk {
  const float* data;
  int64_t tensor, start;  // of the tensor's scores
  int size;
};

// A warp finds the chunk's tensor: the last one that starts at or before the chunk.
// Each lane looks at one of 32 candidates, so that few loads wait for each other.
__device__ inline Chunk chunk_at(const ScoreTable& table, int64_t chunk) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int64_t first = 0, last = table.tensors;
  while (last - first > 1) {
    const int64_t step = ceil_div(last - first, 32);
    const int64_t mine = first + lane * step;
    const bool before = mine < last && __ldg(&table.entry[mine].first_chunk) <= chunk;
    first += (__popc(__ballot_sync(ALL_LANES, before)) - 1) * step;
    last = first + step < last ? first + step : last;
  }
  const ScoreEntry& entry = table.entry[first];
  const int64_t start = (chunk - entry.first_chunk) * TOPK_CHUNK;
  const int64_t left = entry.size - start;
  return {entry.data + start, first, start,
          left < TOPK_CHUNK ? static_cast<int>(left) : TOPK_CHUNK};
}

// Four quads of neighbouring scores of a thread. In a whole chunk all of them exist.
template <bool whole>
struct Batch {
  float value[QUADS][4];
  int left;  // scores of the chunk from the first of these on

  __device__ bool exists(int quad, int i) const {
    return whole || quad * QUAD_STEP + i < left;
  }
};

// __ldg says that the load is from global memory: the compiler cannot know that of a
// pointer from a table.
__device__ inline void load_quad(float (&to)[4], const float* from) {
  const float4 all = __ldg(reinterpret_cast<const float4*>(from));
  to[0] = all.x, to[1] = all.y, to[2] = all.z, to[3] = all.w;
}

__device__ inline void load_some(float (&to)[4], const float* from, int left,
                                 bool aligned) {
  if (aligned && left >= 4) return load_quad(to, from);
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = i < left ? __ldg(from + i) : 0.f;
}

__device__ inline bool is_aligned(const Chunk& chunk) {
  return reinterpret_cast<uintptr_t>(chunk.data) % 16 == 0;
}

// Calls action(batch, the place of its first score in the chunk), with all threads of
// the block together. Neighbouring threads have neighbouring quads.
template <class Action>
__device__ inline void for_each_batch(const Chunk& chunk, Action action) {
  const int mine = 4 * static_cast<int>(threadIdx.x);
  const bool aligned = is_aligned(chunk);
  if (aligned && chunk.size == TOPK_CHUNK) {
#pragma unroll 1
    for (int at = mine; at < TOPK_CHUNK; at += QUADS * QUAD_STEP) {
      Batch<true> batch{{}, TOPK_CHUNK - at};
#pragma unroll
      for (int q = 0; q < QUADS; ++q)
        load_quad(batch.value[q], chunk.data + at + q * QUAD_STEP);
      action(batch, at);
    }
    return;
  }
#pragma unroll 1
  for (int first = 0; first < chunk.size; first += QUADS * QUAD_STEP) {
    const int at = first + mine;
    Batch<false> batch{{}, chunk.size - at};
#pragma unroll
    for (int q = 0; q < QUADS; ++q)
      load_some(batch.value[q], chunk.data + at + q * QUAD_STEP,
                batch.left - q * QUAD_STEP, aligned);
    action(batch, at);
  }
}

// The keys of a batch; those of scores that do not exist mean nothing.
struct Keys {
  uint32_t key[QUADS][4];

  template <bool whole>
  __device__ explicit Keys(const Batch<whole>& batch) {
#pragma unroll
    for (int q = 0; q < QUADS; ++q)
#pragma unroll
      for (int i = 0; i < 4; ++i) key[q][i] = key_of(batch.value[q][i]);
  }
};

// Words of the host that go to device memory as parameters of a launch. That is safe
// under stream capture, where the host's memory may be gone when the graph runs.
struct Words {
  static constexpr int capacity = 448;
  int count;
  uint64_t word[capacity];
};

struct Zeros {
  int64_t* at;
  int64_t count;
};

// The first block stores the words; all of them fill both ranges with zeros.
__global__ void store_words(const Words words, uint64_t* to, Zeros a, Zeros b) {
  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < words.count; i += blockDim.x) to[i] = words.word[i];
  const int64_t step = int64_t{blockDim.x} * gridDim.x;
  const int64_t mine = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (int64_t i = mine; i < a.count; i += step) a.at[i] = 0;
  for (int64_t i = mine; i < b.count; i += step) b.at[i] = 0;
}

}  // namespace fisherprune::cuda::global_topk
