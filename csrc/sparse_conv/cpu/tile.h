// What a task reads: a tile of the image, copied so that every tap of every output
// channel finds its input at one fixed distance, with zeros beyond the borders.
#pragma once

#include <cstdint>
#include <vector>

#include "common/view.h"
#include "sparse_conv/cpu/kernels.h"

namespace fisherprune::cpu::sparse_conv {

// One axis, for positions i of a grid. The source's places are dealt out to planes, of
// which those are copied that a kernel reads: place r of plane a, for position i, is
// (i + r) * split + a - before, with r <= reach. The output has some grids,
// interleaved: position i of a grid is at start + i * step.
struct Axis {
  int64_t size;  // of the source
  int64_t split, before, reach;
  std::vector<int64_t> planes;  // the a of those that are copied
  int64_t step;
  struct Grid {
    int64_t start, count;
  };
  std::vector<Grid> grids;
  int64_t count = 0;  // of the longest grid
};

// For the output of a convolution: one grid, the input dealt out by the stride.
Axis forward_axis(int64_t size, int64_t positions, int64_t kernel, int64_t stride,
                  int64_t pad, int64_t dilation);
// The same with a plane for each of the kernel's places, which all positions read from
// the plane's start.
Axis spread_axis(int64_t size, int64_t positions, int64_t kernel, int64_t stride,
                 int64_t pad, int64_t dilation);
// For the gradient of its input: a grid for each place within a stride.
Axis backward_axis(int64_t size, int64_t positions, int64_t kernel, int64_t stride,
                   int64_t pad, int64_t dilation);

// How the tiles of a call are cut: each has at most so many positions and channels.
struct Cut {
  int64_t rows, cols, channels;
};

// Samples that a tile holds.
struct Block {
  int64_t lanes;  // words of a place
  bool pairs;     // whether a word is two samples, of bfloat16, else it is one
  bool whole;     // whether these words are a chunk, in the image as in the tile

  int64_t samples() const { return pairs ? 2 * lanes : lanes; }
};

// What a call costs depends on, beside its axes.
struct Load {
  int64_t channels, outputs;
  double taps;  // of an output channel, in all grids
  Block block;
  bool cuts_channels;  // whether it may
  bool reads_image;    // else it writes one
  const Kernels& kernels;

  const Form& form() const { return block.pairs ? kernels.pairs : kernels.floats; }
};

// The cut that takes the least time by an estimate.
Cut choose_cut(const Axis& y, const Axis& x, const Load& load);

// A tile as it lies in memory.
struct Tile {
  int64_t row0, col0, rows, cols;  // positions of the grid
  int64_t channel0, channels;
  int64_t sample0;
};

// Where things lie in every tile of a call, in words.
struct TileLayout {
  TileLayout(const Axis& y, const Axis& x, const Cut& cut, const Block& block);
  int64_t place(int64_t channel, int64_t plane_y, int64_t plane_x, int64_t row,
                int64_t col) const {
    return ((channel * planes_y + plane_y) * planes_x + plane_x) * plane + row * pitch +
           col * block.lanes;
  }
  Block block;
  int64_t planes_y, planes_x;  // of a channel
  int64_t pitch, plane;        // from one row, or plane, to the next
  int64_t words;               // of a whole tile
};

void copy_tile(const View4& source, const Axis& y, const Axis& x, const Tile& tile,
               const TileLayout& layout, const Kernels& kernels, float* to);

}  // namespace fisherprune::cpu::sparse_conv
