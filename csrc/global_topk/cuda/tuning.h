// Tuning constants of global_topk on CUDA; these aim at sm_90. The results are exact
// whatever they are, within the bounds that are asserted.
#pragma once

namespace fisherprune::cuda::global_topk {

// Of a block.
constexpr int TOPK_THREADS = 256;
static_assert(TOPK_THREADS % 32 == 0 && TOPK_THREADS <= 1024, "whole warps of a block");

// Four neighbouring scores of a thread, of which so many are under way at a time.
constexpr int QUADS = 4;
constexpr int QUAD_STEP = 4 * TOPK_THREADS;  // from one of them to the next

// Scores that a block takes at a time.
constexpr int TOPK_CHUNK = 8192;
static_assert(TOPK_CHUNK % (QUADS * QUAD_STEP) == 0, "all threads have equal shares");
static_assert(TOPK_CHUNK < 1 << 16, "a chunk's ties are counted in 16 bits");

// Blocks that are resident on a multiprocessor.
constexpr int TOPK_BLOCKS = 4;

// Selections that share a pass: 6 histograms of 2048 counts fill 48 KiB.
constexpr int TOPK_KEEPS = 6;
static_assert(TOPK_KEEPS >= 1 && 2 * TOPK_KEEPS <= TOPK_THREADS,
              "a thread clears each of two counts of ties");

// The longest digit whose histogram lies in shared memory: its counts take 32 KiB.
constexpr int SHARED_DIGIT_BITS = 13;
static_assert(sizeof(int) << SHARED_DIGIT_BITS <= 48 << 10,
              "what any block is granted");

}  // namespace fisherprune::cuda::global_topk
