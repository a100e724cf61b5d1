// The gradient of the kept weights: a sum over samples and positions for each of them.
//
// A task takes some tiles, one after the other; for each it copies the input, and goes
// through the output channels: some chunks of the channel's gradient stay in registers
// while all its taps are multiplied by them. The tasks' sums are added up in order.
#include <algorithm>
#include <vector>

#include "common/cpu/floats.h"
#include "sparse_conv/cpu/core.h"
#include "sparse_conv/cpu/taps.h"
#include "sparse_conv/cpu/work.h"

namespace fisherprune::cpu::sparse_conv {
namespace {

// Whose sums are added up in order: so many, whatever the number of threads.
constexpr int64_t kShares = 8;

struct Job {
  const SparseConvShape& shape;
  const View4 &input, &grad;
  const Work& work;
  const TapLists& taps;
  const Kernels& kernels;
  const Form& form;
};

// Some tiles and output channels, and where their sums go.
struct Task {
  int64_t first, last;
  int64_t channel0, channel1;
  float* sums;
};

// The memory of a thread.
struct Scratch {
  float *input, *grad, *lanes;
};

// The gradient of an output channel in a tile: chunks as the kernels read them.
struct Grad {
  void* first;  // is read only
  int64_t stride, step;
};

// Where it lies, if its samples are innermost, else a copy that is arranged as the tile
// of the input is, with zeros between the rows.
Grad grad_of(const Job& job, const Tile& tile, int64_t channel, float* copy) {
  const View4& v = job.grad;
  const Block& block = job.work.block;
  const bool as_in_tiles = block.pairs || v.dtype == Dtype::float32;
  if (block.whole && as_in_tiles && v.stride[0] == 1) {
    const int64_t place = channel * v.stride[1] + tile.row0 * v.stride[2] +
                          tile.col0 * v.stride[3] + tile.sample0;
    char* const first = static_cast<char*>(const_cast<void*>(v.data));
    return {first + place * (block.pairs ? 2 : 4), v.stride[2], v.stride[3]};
  }
  TileLayout layout = job.work.layout;
  layout.planes_y = layout.planes_x = 1;
  Tile own = tile;
  own.channel0 = channel, own.channels = 1;
  const Axis y{job.shape.out_height, 1, 0, 0, {0}, 1, {}, 0};
  const Axis x{job.shape.out_width, 1, 0, 0, {0}, 1, {}, 0};
  copy_tile(v, y, x, own, layout, job.kernels, copy);
  const int64_t word = block.samples() / block.lanes;  // entries
  return {copy, layout.pitch * word, kChunk * word};
}

// Adds up the lanes of a channel's taps over a tile.
void multiply_channel(const Job& job, const Tile& tile, const Taps& taps,
                      const Grad& grad, const float* input, float* lanes) {
  const int64_t pitch = job.work.layout.pitch, n = job.work.block.lanes;
  const bool whole = job.work.block.whole, pairs = job.work.block.pairs;
  const int64_t floats = (tile.rows - 1) * pitch + tile.cols * n;
  const Pieces pieces(whole ? tile.rows : 1,
                      whole ? tile.cols : (floats + kChunk - 1) / kChunk, job.form);
  bool add = false;
  pieces.for_each([&](int64_t together, int64_t row, int64_t count, int64_t chunk,
                      int64_t chunks) {
    const int64_t at = row * grad.stride + chunk * grad.step;
    const Rows rows{count,       input + row * pitch + chunk * kChunk,
                    pitch,       static_cast<char*>(grad.first) + at * (pairs ? 2 : 4),
                    grad.stride, grad.step};
    job.form.multiply[together][chunks](taps, rows, lanes, add);
    add = true;
  });
}

void run(const Job& job, const Task& task, const Scratch& scratch) {
  const Work& work = job.work;
  for (int64_t i = task.first; i < task.last; ++i) {
    Tile tile = work.tile(i);
    if (!work.block.whole) {  // what is between the rows is multiplied by zero
      std::fill_n(scratch.input, work.layout.words, 0.f);
      std::fill_n(scratch.grad, work.layout.plane + 2 * kChunk, 0.f);
    }
    for (int64_t k = 0; k < work.cuts; ++k) {
      work.choose_channels(tile, k);
      copy_tile(job.input, work.y, work.x, tile, work.layout, job.kernels,
                scratch.input);
      for (int64_t o = task.channel0; o < task.channel1; ++o) {
        const Taps taps = job.taps.at(o, 0, k);
        if (!taps.count) continue;
        const Grad grad = grad_of(job, tile, o, scratch.grad);
        multiply_channel(job, tile, taps, grad, scratch.input, scratch.lanes);
        float* const sums = task.sums + job.taps.starts[job.taps.index(o, 0, k)];
        job.kernels.add_lanes(scratch.lanes, taps.count, sums, i > task.first);
      }
    }
  }
}

int64_t longest(const TapLists& lists) {
  int64_t most = 0;
  for (size_t i = 1; i < lists.starts.size(); ++i)
    most = std::max(most, lists.starts[i] - lists.starts[i - 1]);
  return most;
}

// Adds the sums of all tiles of a kind to the totals.
void add_kind(const Job& job, int64_t count, const Machine& machine, double* totals) {
  const Work& work = job.work;
  const int64_t shares = std::min(kShares, work.count());
  const int64_t splits =
      std::min((machine.threads + shares - 1) / shares, job.shape.outputs);
  const Floats sums = new_floats(shares * count);
  const int64_t lanes = (longest(job.taps) + kChunk) * job.kernels.lanes;
  const int64_t grad = work.layout.plane + 2 * kChunk;
  for_each_task(machine.parallel, shares * splits, [&](int64_t i) {
    const int64_t share = i / splits, split = i % splits;
    const Task task{work.count() * share / shares, work.count() * (share + 1) / shares,
                    job.shape.outputs * split / splits,
                    job.shape.outputs * (split + 1) / splits, &sums[share * count]};
    float* const scratch = scratch_floats(work.layout.words + grad + lanes);
    run(job, task,
        {scratch, scratch + work.layout.words, scratch + work.layout.words + grad});
  });
  for (int64_t share = 0; share < shares; ++share)
    for (int64_t i = 0; i < count; ++i) totals[i] += sums[share * count + i];
}

}  // namespace

void values_gradient(const SparseConvShape& s, const View4& input, const View4& grad,
                     const Pattern& pattern, float* grad_values,
                     const Machine& machine) {
  std::vector<double> totals(pattern.count);
  const Axis y = forward_axis(s.height, s.out_height, s.kernel_h, s.stride_h, s.pad_h,
                              s.dilation_h);
  const Axis x =
      forward_axis(s.width, s.out_width, s.kernel_w, s.stride_w, s.pad_w, s.dilation_w);
  const bool pairs = input.dtype == Dtype::bfloat16 && grad.dtype == Dtype::bfloat16;
  if (pattern.count && y.count && x.count)
    for_each_kind(
        s.samples, pairs, [&](int64_t sample0, int64_t samples, const Block& block) {
          const Load load{s.channels,
                          s.outputs,
                          static_cast<double>(pattern.count) / s.outputs,
                          block,
                          block.whole,
                          true,
                          kernels(machine.capability)};
          const Work work(y, x, load, sample0, samples);
          const TapLists taps = forward_taps(s, pattern, nullptr, y, x, work.cut,
                                             work.layout, machine.parallel);
          const Job job{s, input, grad, work, taps, load.kernels, load.form()};
          add_kind(job, pattern.count, machine, totals.data());
        });
  std::copy(totals.begin(), totals.end(), grad_values);
}

}  // namespace fisherprune::cpu::sparse_conv
