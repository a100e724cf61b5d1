// Estimates how long tiles take, and chooses the best.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "sparse_conv/cpu/tile.h"
#include "sparse_conv/cpu/work.h"

namespace fisherprune::cpu::sparse_conv {
namespace {

// Cycles, each fitted to how long tiles of many cuts took.
struct Cycles {
  double line;             // to copy or to write one
  double row;              // to begin with a row of them: waiting for memory
  double call;             // of a kernel
  double wait;             // of a call that reads an image: for its first row
  double group;            // of what is summed up at a time
  double tap;              // beside its vectors
  double latency;          // of a sum that waits for itself
  double vector;           // of a tile that fills the second-level cache
  double smaller, larger;  // less, and more, for each halving and doubling of the tile
  double least;            // of a vector
};
constexpr Cycles kHalfLines{10, 110, 20, 400, 10, 2, 4, 1.2, 0.1, 0.25, 0.7};  // Zen 3
constexpr Cycles kLines{5, 140, 4, 400, 30, 3, 4, 0.85, 0.3, 0.3, 0.5};        // a Xeon

double vector_cost(int64_t words, const Cycles& cycles) {
  static const double cache = [] {
    long bytes = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return bytes > 0 ? static_cast<double>(bytes) : 0x1p19;
  }();
  const double doublings = std::log2(4 * static_cast<double>(words) / cache);
  const double slope = doublings < 0 ? cycles.smaller : cycles.larger;
  return std::max(cycles.least, cycles.vector + doublings * slope);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cycles for each place of the grid.
double cost_of(const Axis& y, const Axis& x, const Load& load, const Cut& cut) {
  const TileLayout layout(y, x, cut, load.block);
  const bool whole = load.block.whole;
  const Cycles& cycles = load.kernels.lanes == kChunk ? kLines : kHalfLines;
  const Pieces pieces(whole ? cut.rows : 1,
                      whole ? cut.cols : ceil_div(cut.rows * layout.pitch, kChunk),
                      load.form());
  const double calls = pieces.calls(), groups = pieces.groups();
  const double chunks = pieces.rows * pieces.chunks;
  const double vectors = chunks / groups * kChunk / load.kernels.lanes;
  const double tap =
      std::max(vectors * vector_cost(layout.words, cycles), cycles.latency) +
      cycles.tap;
  // Of all cuts of the channels, and all grids.
  const double cuts = ceil_div(load.channels, cut.channels);
  const double outputs =
      static_cast<double>(load.outputs) * y.grids.size() * x.grids.size();
  const double rows_read = static_cast<double>(load.channels) * layout.planes_y *
                           layout.planes_x * (cut.rows + y.reach);
  const double lines_read = rows_read * layout.pitch / kChunk;
  // An image that is read is so for each cut, and its rows behind the first of a call
  // are fetched ahead; one that is written is read again to be added to.
  const double rows_of_image = load.reads_image ? 0 : outputs * cut.rows;
  const double lines_of_image =
      outputs * (load.reads_image ? cuts : 2 * cuts - 1) * chunks;
  const double call = cycles.call + (load.reads_image ? cycles.wait : 0);
  const double all = cycles.line * (lines_read + lines_of_image) +
                     cycles.row * (rows_read + rows_of_image) +
                     outputs * cuts * (call * calls + cycles.group * groups) +
                     load.outputs * load.taps * groups * tap;
  return all / static_cast<double>(cut.rows * cut.cols);
}

// The lengths of pieces of so many places that are as even as can be.
std::vector<int64_t> lengths(int64_t count) {
  std::vector<int64_t> found;
  for (int64_t pieces = 1; pieces <= count; ++pieces) {
    const int64_t length = ceil_div(count, pieces);
    if (found.empty() || found.back() != length) found.push_back(length);
  }
  return found;
}

}  // namespace

Pieces::Pieces(int64_t rows, int64_t chunks, const Form& form)
    : rows(rows), chunks(chunks), cols(ceil_div(chunks, form.most_chunks)) {
  const int64_t widest = ceil_div(chunks, cols);
  together = std::min<int64_t>({rows, kMostRows, form.most_chunks / widest});
}

Cut choose_cut(const Axis& y, const Axis& x, const Load& load) {
  Cut best{1, 1, load.channels};
  double least = std::numeric_limits<double>::infinity();
  const std::vector<int64_t> heights = lengths(y.count), widths = lengths(x.count);
  for (int64_t channels = load.channels;;) {
    const double before = least;
    for (const int64_t rows : heights)
      for (const int64_t cols : widths) {
        const Cut cut{rows, cols, channels};
        const double cost = cost_of(y, x, load, cut);
        if (cost < least) least = cost, best = cut;
      }
    if (channels == 1 || !load.cuts_channels || least == before) return best;
    channels = ceil_div(channels, 2);
  }
}

}  // namespace fisherprune::cpu::sparse_conv
