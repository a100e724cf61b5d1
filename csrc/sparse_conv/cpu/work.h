// A call's work in tiles: of blocks of samples, and of positions.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "common/check.h"
#include "sparse_conv/cpu/kernels.h"
#include "sparse_conv/cpu/tile.h"

namespace fisherprune::cpu::sparse_conv {

// How some rows of chunks are dealt out to calls of kernels: pieces of the rows, as
// even as can be, and in each some rows at a time.
struct Pieces {
  Pieces(int64_t rows, int64_t chunks, const Form& form);
  int64_t rows, chunks;
  int64_t cols;      // pieces of a row
  int64_t together;  // rows at a time

  int64_t calls() const { return cols * (rows % together ? 2 : 1); }
  int64_t groups() const { return cols * ((rows + together - 1) / together); }

  // call(rows at a time, first row, rows, first chunk, chunks)
  template <class Call>
  void for_each(const Call& call) const {
    const int64_t most = rows - rows % together;
    for (int64_t i = 0; i < cols; ++i) {
      const int64_t first = chunks * i / cols, count = chunks * (i + 1) / cols - first;
      if (most) call(together, int64_t{0}, most, first, count);
      if (most < rows) call(rows - most, most, rows - most, first, count);
    }
  }
};

// The tiles of some samples, in blocks of as many for each place. The blocks of a place
// follow each other, because what they read shares pages of memory.
struct Work {
  Work(const Axis& y, const Axis& x, const Load& load, int64_t sample0, int64_t samples)
      : y(y),
        x(x),
        channels(load.channels),
        sample0(sample0),
        block(load.block),
        blocks(samples / block.samples()),
        cut(choose_cut(y, x, load)),
        layout(checked(TileLayout(y, x, cut, block))),
        rows((y.count + cut.rows - 1) / cut.rows),
        cols((x.count + cut.cols - 1) / cut.cols),
        cuts((channels + cut.channels - 1) / cut.channels) {}

  int64_t count() const { return rows * cols * blocks; }

  // The i-th tile; its channels are those of the first cut.
  Tile tile(int64_t i) const {
    const int64_t place = i / blocks;
    Tile tile{place / cols * cut.rows,
              place % cols * cut.cols,
              cut.rows,
              cut.cols,
              0,
              cut.channels,
              sample0 + i % blocks * block.samples()};
    tile.rows = std::min(tile.rows, y.count - tile.row0);
    tile.cols = std::min(tile.cols, x.count - tile.col0);
    return tile;
  }
  void choose_channels(Tile& tile, int64_t k) const {
    tile.channel0 = k * cut.channels;
    tile.channels = std::min(cut.channels, channels - tile.channel0);
  }

  // Taps have places of 32 bits.
  static const TileLayout& checked(const TileLayout& layout) {
    check(layout.words <= INT32_MAX,
          "sparse_conv2d: what the kernel reaches of the padded input must be at most ",
          INT32_MAX, " numbers for one row of the output, got ", layout.words);
    return layout;
  }

  const Axis &y, &x;
  int64_t channels, sample0;
  Block block;
  int64_t blocks;
  Cut cut;
  TileLayout layout;
  int64_t rows, cols, cuts;
};

// Calls each(sample0, samples, block) for the whole chunks of a batch, and for the
// rest.
template <class Each>
void for_each_kind(int64_t samples, bool pairs, const Each& each) {
  const Block whole{kChunk, pairs, true};
  const int64_t rest = samples % whole.samples();
  if (samples > rest) each(int64_t{0}, samples - rest, whole);
  if (rest) each(samples - rest, rest, Block{rest, false, false});
}

// Channels of a task, if it has not all of a tile's.
constexpr int64_t kLeastChannels = 16;

// Into how many tasks a tile's output channels are dealt: each copies the tile for
// itself, so that there are several only where there are few tiles, and no more than
// make the threads' shares even.
inline int64_t splits_of(int64_t tiles, int64_t channels, int64_t threads) {
  if (tiles >= 2 * threads) return 1;
  const int64_t even = threads / std::gcd(tiles, threads);
  return std::clamp<int64_t>(channels / kLeastChannels, 1, even);
}

}  // namespace fisherprune::cpu::sparse_conv
