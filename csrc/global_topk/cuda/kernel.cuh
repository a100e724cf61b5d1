// global_topk: radix selection over many score tensors in place.
//
// A block takes chunks of 8192 scores, of any tensors. There are three passes over the
// scores: histograms of 11, 11 and 10 bits, of the keys that begin with the digits
// found so far. The last block of a pass decides on its digit. Then come the masks, see
// masks.cuh.
//
// Memory traffic: 4 bytes a score and pass. Atomic additions are of integers only, so
// the results do not depend on the order of the additions.
#pragma once

#include "global_topk/cuda/block.cuh"

namespace fisherprune::cuda::global_topk {

// What is known of a selection.
struct Selection {
  int64_t keep;
  int64_t left;     // of those that match the prefix, how many are kept
  int64_t equal;    // how many match the prefix
  uint64_t prefix;  // the first bits of the threshold's key, zeros behind them
};

struct Digit {
  int prefix_bits, bits;

  FISHERPRUNE_HOST_DEVICE int shift() const { return 32 - prefix_bits - bits; }
};

constexpr Digit DIGITS[] = {{0, 11}, {11, 11}, {22, 10}};
constexpr int64_t MOST_BINS = 1 << 11;
static_assert(DIGITS[0].prefix_bits == 0 && DIGITS[1].prefix_bits == DIGITS[0].bits &&
                  DIGITS[2].prefix_bits == DIGITS[0].bits + DIGITS[1].bits &&
                  DIGITS[2].prefix_bits + DIGITS[2].bits == 32,
              "each digit follows the one before, up to the last bit");
static_assert(1 << DIGITS[0].bits <= MOST_BINS && 1 << DIGITS[1].bits <= MOST_BINS &&
              1 << DIGITS[2].bits <= MOST_BINS);

// Adds one in shared memory; the hardware joins lanes with equal bins.
__device__ inline void count_one(bool active, uint32_t bin, uint32_t* counts) {
  if (active) atomicAdd(&counts[bin], 1u);
}

// Adds the active lanes of a warp in global memory, with one addition for each bin:
// equal scores cost no more than different ones.
__device__ inline void count_one(bool active, uint32_t bin,
                                 unsigned long long* counts) {
  if (__ballot_sync(ALL_LANES, active) == 0) return;
  const unsigned same = __match_any_sync(ALL_LANES, active ? bin : ~0u);
  const int lane = threadIdx.x % 32;
  if (active && lane == __ffs(same) - 1)
    atomicAdd(&counts[bin], static_cast<unsigned long long>(__popc(same)));
}

// Adds to the digit's histogram for each of n prefixes; with `every` there is one
// prefix, of no bits. A key matches where, in 32 bits, key - prefix is below a power of
// two. A block's share of the scores is far below 2^32.
template <bool every, bool whole, class Count>
__device__ inline void count_digits(const Batch<whole>& batch,
                                    const Selection* selections, int n, Digit digit,
                                    Count* counts) {
  const Keys keys(batch);
  const uint32_t most = 0xffffffffu >> digit.prefix_bits;
#pragma unroll 1
  for (int k = 0; k < n; ++k, counts += 1 << digit.bits) {
    const uint32_t prefix = every ? 0 : static_cast<uint32_t>(selections[k].prefix);
#pragma unroll
    for (int q = 0; q < QUADS; ++q)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t rest = keys.key[q][i] - prefix;
        count_one(batch.exists(q, i) && (every || rest <= most), rest >> digit.shift(),
                  counts);
      }
  }
}

// ---- scores that are not finite ----

constexpr uint32_t INFINITY_BITS = 0x7f800000u;

// Where to count them for each tensor; null where they are not counted. Their keys lie
// at both ends: where the first digit's histogram is empty there, no score need be
// read. With no histogram all scores are read.
struct Nonfinite {
  unsigned long long* counts;
  const unsigned long long* first_digits;
};

__device__ inline bool wants_nonfinite(const Nonfinite& nonfinite) {
  if (!nonfinite.counts) return false;
  if (!nonfinite.first_digits) return true;
  constexpr int shift = 32 - 11, bins = 1 << 11;
  static_assert(DIGITS[0].bits == 11);
  // Keys of -inf and below, and of +inf and above.
  constexpr int low = (0u - (0x80000000u | INFINITY_BITS)) >> shift;
  constexpr int high = (0x80000000u | INFINITY_BITS) >> shift;
  unsigned long long any = 0;
#pragma unroll
  for (int bin = 0; bin <= low; ++bin) any |= nonfinite.first_digits[bin];
#pragma unroll
  for (int bin = high; bin < bins; ++bin) any |= nonfinite.first_digits[bin];
  return any != 0;
}

__device__ inline void count_nonfinite(const Chunk& chunk, unsigned long long* counts) {
  int bad = 0;
  for_each_batch(chunk, [&](const auto& batch, int) {
#pragma unroll
    for (int q = 0; q < QUADS; ++q)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        bad += (__float_as_uint(batch.value[q][i]) & INFINITY_BITS) == INFINITY_BITS;
  });
  if (bad) atomicAdd(&counts[chunk.tensor], static_cast<unsigned long long>(bad));
}

// ---- decisions ----

// What the last block decides from a digit's histograms: the digit of n selections,
// whose histograms begin `stride` apart. With n = 0 there is nothing to decide.
struct Decision {
  Selection* selections;
  int n;
  int64_t stride;
  float* thresholds;
  unsigned long long* ticket;
};

// A block finds the digit of a selection's threshold: the bin in which the kept scores
// end, counted from the top.
__device__ inline void decide(Selection* selection, const unsigned long long* counts,
                              Digit digit, float* threshold, int64_t* shared) {
  const Selection before = *selection;
  Selection after{0, 0, 0, key_of(__uint_as_float(INFINITY_BITS))};
  if (before.keep != 0) {
    const int64_t top = (1 << digit.bits) - 1;
    const Place place = find_place(
        top + 1, before.left,
        [&](int64_t i) { return static_cast<int64_t>(__ldcg(counts + top - i)); },
        shared);
    const uint64_t bin = static_cast<uint64_t>(top - place.at);
    after = {before.keep, before.left - place.before, place.here,
             before.prefix | bin << digit.shift()};
  }
  __syncthreads();  // all have read `before`
  if (threadIdx.x != 0) return;
  *selection = after;
  if (digit.shift() == 0) *threshold = value_of(static_cast<uint32_t>(after.prefix));
}

__device__ inline void decide_all(const Decision& decision, Digit digit,
                                  const unsigned long long* totals, int64_t* shared) {
  if (!is_last_block(decision.ticket, shared)) return;
  for (int k = 0; k < decision.n; ++k)
    decide(decision.selections + k, totals + k * decision.stride, digit,
           decision.thresholds + k, shared);
}

// Each block counts the digits of its chunks in shared memory, for n selections that
// have a prefix or for all scores, and adds its counts to `totals`. The last block
// decides. It reads every score once.
template <bool every>
__global__ void __launch_bounds__(TOPK_THREADS, TOPK_BLOCKS)
    topk_histogram_kernel(ScoreTable table, const Selection* selections, int n,
                          Digit digit, unsigned long long* totals, Nonfinite nonfinite,
                          Decision decision) {
  uint32_t* counts = reinterpret_cast<uint32_t*>(dynamic_shared());
  const int bins = n << digit.bits;
  const bool all_finite = !wants_nonfinite(nonfinite);
  for (int i = threadIdx.x; i < bins; i += TOPK_THREADS) counts[i] = 0;
  __syncthreads();
  for (int64_t c = blockIdx.x; c < table.chunks; c += gridDim.x) {
    const Chunk chunk = chunk_at(table, c);
    for_each_batch(chunk, [&](const auto& batch, int) {
      count_digits<every>(batch, selections, n, digit, counts);
    });
    if (!all_finite) count_nonfinite(chunk, nonfinite.counts);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < bins; i += TOPK_THREADS)
    if (counts[i]) atomicAdd(&totals[i], static_cast<unsigned long long>(counts[i]));
  if (decision.n > 0)
    decide_all(decision, digit, totals, reinterpret_cast<int64_t*>(counts));
}

// The same for digits too long for shared memory, without decisions.
__global__ void __launch_bounds__(TOPK_THREADS, TOPK_BLOCKS)
    topk_long_histogram_kernel(ScoreTable table, const Selection* selection,
                               Digit digit, unsigned long long* totals) {
  for (int64_t c = blockIdx.x; c < table.chunks; c += gridDim.x)
    for_each_batch(chunk_at(table, c), [&](const auto& batch, int) {
      count_digits<false>(batch, selection, 1, digit, totals);
    });
}

}  // namespace fisherprune::cuda::global_topk
