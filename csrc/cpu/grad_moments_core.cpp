// Who does what. The samples go by in blocks. Of each block the tasks first pack the
// input, zero-padded, to [channel][sample][position], and the output gradient to
// [column of tiles][position of all samples][lane]. Then each task owns a tile, up to
// kTileRows rows of the patch by kTileLanes outputs, whose two moments fit the
// first-level cache. For every few of its rows it runs over all samples of the block:
// the micro-kernel holds the sums of one group in registers and adds G and G * G to the
// tile. At the end of the block the tile is transposed and added to the accumulators.
//
// Memory traffic. Input and gradient are read once and written once in packed form.
// Every patch row of a tile reads the packed input of its channel in place (no im2col);
// the column's packed gradient comes from the second-level cache once for every 6 rows.
// The accumulators are read and written once a block, never once a sample.
//
// Every element has one owner and its additions one order: results are equal bit for
// bit whatever the number of threads.
#include "grad_moments_core.h"

#include <algorithm>
#include <memory>
#include <new>
#include <numeric>

#include "grad_moments_pack.h"
#include "tuning.h"

namespace fisherprune {
namespace {

constexpr std::align_val_t kAlignment{64};

struct FreeFloats {
  void operator()(float* p) const { ::operator delete(p, kAlignment); }
};

using Floats = std::unique_ptr<float[], FreeFloats>;

Floats new_floats(int64_t count) {
  return Floats(static_cast<float*>(::operator new(count * sizeof(float), kAlignment)));
}

class Call {
 public:
  Call(const GradMoments& m, const Microkernels& kernels, const ParallelFor& each,
       int64_t threads);
  void run();

 private:
  void pack(Block block);
  void pack_input(Block block, int64_t task);
  void pack_grad(Block block, int64_t task);
  void square_packed();
  void multiply(Block block, float* sum, float* sum_sq);
  void tile(const std::vector<Run>& runs, int64_t task, float* sum, float* sum_sq);
  void micro_tiles(const Column& column, const ColumnOfTiles& at, int64_t row,
                   int64_t end, float* const moments[2], float* sum, float* sum_sq,
                   float* carry);
  void prefetch(const ColumnOfTiles& at, int64_t row, int64_t rows, int64_t lane,
                const float* accumulator);
  void add(const ColumnOfTiles& at, int64_t row, int64_t rows, const float* tile,
           float* accumulator);
  MicroTileOf micro_tile(const ColumnOfTiles& at) const;
  int64_t grad_size() const { return block_positions_ * plan_.packed_lanes; }
  int64_t input_size() const {
    return plan_.input_rows * plan_.input_stride() * plan_.input_lanes;
  }

  const GradMoments& moments_;
  const Microkernels& kernels_;
  const ParallelFor& each_;
  Plan plan_;
  int64_t patch_;
  int64_t block_positions_;  // at most, in one block
  int64_t task_rows_;        // rows of the patch in a task's tile
  int64_t tasks_per_column_;
  Floats input_, grad_, carry_;
};

constexpr int64_t kChannelsPerTask = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// As many micro-tiles as a tile holds, fewer where the threads would run out of tasks.
int64_t choose_task_rows(int64_t rows, int64_t patch, int64_t columns,
                         int64_t threads) {
  const int64_t micro_tiles = ceil_div(patch, rows);
  const int64_t fair = micro_tiles * columns / (4 * threads);
  return std::clamp<int64_t>(fair, 1, tuning::kTileRows / rows) * rows;
}

Call::Call(const GradMoments& m, const Microkernels& kernels, const ParallelFor& each,
           int64_t threads)
    : moments_(m),
      kernels_(kernels),
      each_(each),
      plan_(plan_of(m.shape, kernels)),
      patch_(m.shape.patch()),
      block_positions_(plan_.positions_of(plan_.block_at(0))) {
  // The last column of a convolution group may be narrower, with taller micro-tiles.
  const int64_t rows = std::lcm(micro_tile(plan_.columns.front()).rows,
                                micro_tile(plan_.columns.back()).rows);
  task_rows_ = choose_task_rows(rows, patch_, plan_.columns.size(), threads);
  tasks_per_column_ = ceil_div(patch_, task_rows_);
  input_ = new_floats(input_size());
  grad_ = new_floats(grad_size());
  if (plan_.carries)
    carry_ = new_floats(tasks_per_column_ * task_rows_ * plan_.packed_lanes);
}

MicroTileOf Call::micro_tile(const ColumnOfTiles& at) const {
  if (plan_.operand == Operand::lanes) return kernels_.depthwise;
  const ConvShape& s = plan_.shape;
  const int64_t group = std::min(s.group_size, s.samples);
  const bool brief = !plan_.products && !plan_.carries &&
                     s.positions() * group <= tuning::kShortRun;
  return (brief ? kernels_.brief : kernels_.tall)[at.vectors];
}

void Call::run() {
  for (int64_t u = 0; u < plan_.units; u += plan_.block_units) {
    const Block block = plan_.block_at(u);
    pack(block);
    multiply(block, moments_.sum, plan_.products ? nullptr : moments_.sum_sq);
    if (!plan_.products) continue;
    square_packed();
    multiply(block, moments_.sum_sq, nullptr);
  }
}

void Call::pack(Block block) {
  const int64_t chunks = ceil_div(plan_.input_rows, kChannelsPerTask);
  const int64_t inputs = chunks * block.units();
  const int64_t grads = static_cast<int64_t>(plan_.columns.size()) * block.units();
  each_(inputs + grads, [&](int64_t task) {
    if (task < inputs)
      pack_input(block, task);
    else
      pack_grad(block, task - inputs);
  });
}

void Call::pack_input(Block block, int64_t task) {
  const ConvShape& s = plan_.shape;
  const int64_t place = task % block.units();
  const int64_t unit = block.first + place;
  const Image image{moments_.input, s.height, s.width, unit / plan_.units_per_sample};
  const Window window = plan_.input_window(unit);
  const int64_t first = task / block.units() * kChannelsPerTask;
  const int64_t last = std::min(first + kChannelsPerTask, plan_.input_rows);
  const int64_t stride = plan_.input_stride() * plan_.input_lanes;
  float* to = input_.get() + first * stride + place * plan_.plane() * plan_.input_lanes;
  if (plan_.operand == Operand::broadcast) {
    pack_planes(image, first, last - first, window, kernels_, to, stride);
    return;
  }
  for (int64_t row = first; row < last; ++row, to += stride) {
    const int64_t group = row / s.group_channels() * kernels_.lanes;
    const int64_t channel = group * s.group_channels() + row % s.group_channels();
    pack_lanes(image, channel, s.group_channels(),
               std::min<int64_t>(kernels_.lanes, s.groups - group), kernels_.lanes,
               window, kernels_, to);
  }
}

void Call::pack_grad(Block block, int64_t task) {
  const ConvShape& s = plan_.shape;
  const ColumnOfTiles& at = plan_.columns[task / block.units()];
  const int64_t place = task % block.units();
  const int64_t unit = block.first + place;
  const Image image{moments_.grad, s.out_height, s.out_width,
                    unit / plan_.units_per_sample};
  const int64_t width = at.vectors * kernels_.lanes;
  // Only blocks of one unit have units of fewer rows.
  const int64_t position = place * plan_.unit_rows * s.out_width;
  pack_lanes(image, at.first_output, at.output_step, at.lanes, width,
             plan_.grad_window(unit), kernels_,
             grad_.get() + at.grad_lane * block_positions_ + position * width);
}

void square(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] *= values[i];
}

void Call::square_packed() {
  constexpr int64_t kPiece = 1 << 14;
  const int64_t pieces = ceil_div(input_size(), kPiece);
  each_(pieces + ceil_div(grad_size(), kPiece), [&](int64_t task) {
    const bool first = task < pieces;
    const int64_t begin = (first ? task : task - pieces) * kPiece;
    const int64_t size = first ? input_size() : grad_size();
    square((first ? input_ : grad_).get() + begin, std::min(kPiece, size - begin));
  });
}

void Call::multiply(Block block, float* sum, float* sum_sq) {
  const std::vector<Run> runs = plan_.runs_of(block);
  each_(static_cast<int64_t>(plan_.columns.size()) * tasks_per_column_,
        [&](int64_t task) { tile(runs, task, sum, sum_sq); });
}

void Call::tile(const std::vector<Run>& runs, int64_t task, float* sum,
                float* sum_sq) {
  const ColumnOfTiles& at = plan_.columns[task / tasks_per_column_];
  const int64_t row = task % tasks_per_column_ * task_rows_;
  const int64_t end = std::min(row + task_rows_, patch_);
  const int64_t width = at.vectors * kernels_.lanes;
  alignas(64) float tiles[2][tuning::kTileFloats];
  std::fill_n(tiles[0], task_rows_ * width, 0.f);
  if (sum_sq) std::fill_n(tiles[1], task_rows_ * width, 0.f);
  const Column column{
      input_.get() + at.input_row * plan_.input_stride() * plan_.input_lanes,
      grad_.get() + at.grad_lane * block_positions_, plan_.offset.data(), runs.data(),
      static_cast<int64_t>(runs.size())};
  float* carry = plan_.carries ? carry_.get() + at.grad_lane * tasks_per_column_ *
                                                    task_rows_ + row * width
                               : nullptr;
  float* const accumulators[2] = {sum, sum_sq};
  micro_tiles(column, at, row, end, accumulators, tiles[0], sum_sq ? tiles[1] : nullptr, carry);
  add(at, row, end - row, tiles[0], sum);
  if (sum_sq) add(at, row, end - row, tiles[1], sum_sq);
}

void Call::micro_tiles(const Column& column, const ColumnOfTiles& at, int64_t row,
                       int64_t end, float* const moments[2], float* sum, float* sum_sq, float* carry) {
  constexpr int64_t kMostRows = 16;
  const MicroTileOf kernel = micro_tile(at);
  const int64_t step = kernel.rows * at.vectors * kernels_.lanes;
  const int64_t share = ceil_div(at.lanes, ceil_div(end - row, kernel.rows));
  int64_t lane=0;
  for (int64_t k = row; k < end; k += kernel.rows) {
    for(int64_t l=lane;l<std::min(lane+share,at.lanes);++l) {
      prefetch(at,row,end-row,l,moments[0]);
      if (moments[1]) prefetch(at,row,end-row,l,moments[1]);
    }
    lane+=share;
    int64_t base[kMostRows];
    for (int64_t r = 0; r < kernel.rows; ++r)
      base[r] = plan_.base[std::min(k + r, end - 1)];  // repeats are left out by add
    kernel.run(column, base, sum, sum_sq, carry);
    sum += step;
    if (sum_sq) sum_sq += step;
    if (carry) carry += step;
  }
}

void Call::prefetch(const ColumnOfTiles& at, int64_t row, int64_t rows, int64_t lane,
                    const float* accumulator) {
  constexpr int64_t kLine = 16;
  const float* p = accumulator + (at.first_output+lane*at.output_step) * patch_ + row;
  for (int64_t i = 0; i < rows; i += kLine) __builtin_prefetch(p + i, 1, 2);
  __builtin_prefetch(p + rows - 1, 1, 2);
}

void Call::add(const ColumnOfTiles& at, int64_t row, int64_t rows, const float* tile,
               float* accumulator) {
  kernels_.add_transposed(tile, at.vectors * kernels_.lanes, rows, at.lanes,
                          accumulator + at.first_output * patch_ + row,
                          at.output_step * patch_);
}

}  // namespace

void grad_moments_core(const GradMoments& moments, Capability capability,
                       const ParallelFor& parallel_for, int64_t threads) {
  const ConvShape& s = moments.shape;
  if (s.samples == 0 || s.positions() == 0 || s.outputs == 0 || s.patch() == 0) return;
  Call(moments, microkernels(capability), parallel_for, threads).run();
}

}  // namespace fisherprune
