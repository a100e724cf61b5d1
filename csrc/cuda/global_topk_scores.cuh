// Score tensors as the top-k kernels see them: a table in device memory, chunks that
// lie within one tensor, four neighbouring scores a thread at a time.
#pragma once

#include "../global_topk.h"
#include "launch.cuh"
#include "tuning.h"

namespace fisherprune {

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

// Four scores of a thread, of which the first `count` exist.
struct Quad {
  float value[4];
  int count;
};

__device__ inline Chunk chunk_at(const ScoreTable& table, int64_t chunk) {
  int64_t first = 0, last = table.tensors;  // the last tensor that starts at or before
  while (last - first > 1) {
    const int64_t middle = (first + last) / 2;
    if (table.entry[middle].first_chunk <= chunk)
      first = middle;
    else
      last = middle;
  }
  const ScoreEntry& entry = table.entry[first];
  const int64_t start = (chunk - entry.first_chunk) * TOPK_CHUNK;
  const int64_t left = entry.size - start;
  return {entry.data + start, first, start,
          left < TOPK_CHUNK ? static_cast<int>(left) : TOPK_CHUNK};
}

// The loads say that they are of global memory: the compiler can't know it of a pointer
// that comes out of a table.
__device__ inline Quad load_whole_quad(const float* from) {
  const float4 all = __ldg(reinterpret_cast<const float4*>(from));
  return {{all.x, all.y, all.z, all.w}, 4};
}

__device__ inline Quad load_quad(const Chunk& chunk, int at) {
  const int left = chunk.size - at;
  Quad quad{{0.f, 0.f, 0.f, 0.f}, left < 0 ? 0 : left < 4 ? left : 4};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < quad.count) quad.value[i] = __ldg(chunk.data + at + i);
  return quad;
}

// Calls action(quad, its place in the chunk) with all threads of a warp together, in
// the order of the places. Of whole chunks some quads are under way at a time.
template <class Action>
__device__ inline void for_each_quad(const Chunk& chunk, Action action) {
  constexpr int together = 4, step = 4 * TOPK_THREADS;
  static_assert(TOPK_CHUNK % (together * step) == 0);
  const int mine = 4 * static_cast<int>(threadIdx.x);
  if (chunk.size == TOPK_CHUNK && reinterpret_cast<uintptr_t>(chunk.data) % 16 == 0) {
#pragma unroll 1
    for (int at = mine; at < TOPK_CHUNK; at += together * step) {
      Quad quads[together];
#pragma unroll
      for (int i = 0; i < together; ++i)
        quads[i] = load_whole_quad(chunk.data + at + i * step);
#pragma unroll
      for (int i = 0; i < together; ++i) action(quads[i], at + i * step);
    }
    return;
  }
#pragma unroll 1
  for (int first = 0; first < chunk.size; first += step)
    action(load_quad(chunk, first + mine), first + mine);
}

// Host words into device memory by way of the launch's parameters: safe under stream
// capture, where the host's memory may be gone when the graph runs.
struct Words {
  static constexpr int capacity = 448;
  int count;
  uint64_t word[capacity];
};

__global__ void store_words(const Words words, uint64_t* to) {
  for (int i = threadIdx.x; i < words.count; i += blockDim.x) to[i] = words.word[i];
}

}  // namespace fisherprune
