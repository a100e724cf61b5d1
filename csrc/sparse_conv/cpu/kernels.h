// The vector code of sparse convolutions: one source (body.h), compiled for each set of
// vector instructions, chosen at run time. Free of torch.
#pragma once

#include <cstdint>

#include "common/cpu/capability.h"

namespace fisherprune::cpu::sparse_conv {

// Words that lie side by side at a position, a cache line. A word is the float of one
// sample, or the bfloat16 numbers of two, which are widened in registers. Where a batch
// has fewer samples, a chunk is 16 entries of the row of positions and samples.
constexpr int kChunk = 16;
constexpr int kMostChunks =
    12;                       // that a call sums up at a time, if registers hold them
constexpr int kMostRows = 3;  // that these lie in

// A kept weight: its value, and where it reads, from the chunk it is for, in words.
struct Tap {
  int32_t offset;
  float weight;
};

struct Taps {
  const Tap* first;
  int64_t count;
};

// Rows of chunks, side by side in the tile that is read, and in the image beside it
// `step` entries apart; and words, or entries, from one row to the next. An image that
// is too large to stay in the caches may go past them: its chunks must be whole lines.
struct Rows {
  int64_t count;
  const float* tile;
  int64_t tile_stride;
  void* image;
  int64_t stride, step;
  bool past_caches = false;
};

// image = start + before + sum over the taps of weight * tile, where `before` lies as
// the image does, may be it, or null; with `relu` what is below 0 becomes 0. In
// float32; an image of bfloat16 is rounded at the end.
using Correlate = void (*)(const Taps& taps, const Rows& rows, float start,
                           const void* before, bool relu);

// lanes[i] = sum over rows and chunks of image * tile at the place of tap i, or +=
// that; the lanes of a vector are still to be added up. The image is read only.
using Multiply = void (*)(const Taps& taps, const Rows& rows, float* lanes, bool add);

// The kept weights of an output channel as they are given: the i-th reads the tile at
// places[columns[i]].
struct Kept {
  const float* values;
  const int32_t* columns;
  const int32_t* places;
  int64_t count;
};

// to = start + before + sum over the kept weights of weight * tile, in floats, for some
// chunks side by side; `before` may be `to`, or null; with `relu` as above.
using Sum = void (*)(const Kept& kept, const float* tile, float start,
                     const float* before, bool relu, float* to);

// For tiles and images of one kind of words.
struct Form {
  int most_chunks;  // of all rows that are summed up at a time
  // By rows at a time, of which rows.count is a multiple, and chunks of a row.
  Correlate correlate[kMostRows + 1][kMostChunks + 1];
  Multiply multiply[kMostRows + 1][kMostChunks + 1];
  // Makes chunks, side by side, of samples whose places lie side by side: transposes
  // squares.
  void (*transpose)(const void* from, int64_t sample_stride, int64_t count, float* to);
};

struct Kernels {
  int lanes;  // words of one vector
  Form floats, pairs;
  Sum sum[kMostChunks + 1];  // by chunks, as many as the floats' form sums up at a time
  // Waits until what went past the caches is in memory.
  void (*drain)();
  // Copies chunks that are `step` bytes apart to where they lie side by side.
  void (*copy)(const void* from, int64_t step, int64_t count, float* to);
  // Copies rows of `length` floats, that are so many apart.
  void (*copy_rows)(const float* from, int64_t from_stride, int64_t rows,
                    int64_t length, float* to, int64_t to_stride);
  // Adds up the lanes of `count` vectors, to sums, or to what is there. Behind the last
  // vector up to a square less one may be read.
  void (*add_lanes)(const float* lanes, int64_t count, float* sums, bool add);
};

const Kernels& kernels(Capability capability);

}  // namespace fisherprune::cpu::sparse_conv
