// Who does what. A task owns some channels and one column of outputs, and takes all
// samples, a block at a time. It transforms the column's output gradients, and then,
// panel by panel, its channels of the input. The micro-kernel multiplies them place by
// place, turns the 36 sums of a unit into 9 taps, and adds these and their squares to
// the task's moments. At the end the task transposes its moments and adds them to the
// accumulators, except where rounding has spoilt them: these are left to the plain way.
// Weights of small moments may have nothing but rounding: those whose inputs meet no
// gradient get none.
//
// Memory traffic. A task reads its operands once. Their transforms are more than twice
// as large, and stay in its second-level cache. Tasks do not share them: to wait for
// memory would take longer than to transform the operands again. The accumulators are
// read and written once.
//
// Every element has one owner, and its additions have one order: results are equal bit
// for bit, whatever the number of threads.
#include "grad_moments/cpu/winograd.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "common/cpu/floats.h"
#include "common/integers.h"
#include "grad_moments/cpu/accumulator_tile.h"
#include "grad_moments/cpu/meets.h"
#include "grad_moments/cpu/pack.h"
#include "grad_moments/cpu/tuning.h"
#include "grad_moments/cpu/units.h"

namespace fisherprune::cpu::grad_moments {
namespace {

using winograd::kEdge;
using winograd::kPlaces;
using winograd::kReach;
using winograd::kTaps;

constexpr int64_t kHalo = kReach - kEdge;

// Rows of units are rows of tiles.
Units choose_units(const ConvShape& s) {
  const int64_t rows = ceil_div(s.out_height, kEdge);
  const int64_t cols = ceil_div(s.out_width, kEdge);
  return units_of(s.samples, rows, cols, s.group_size, tuning::kWinogradTiles / cols,
                  tuning::kWinogradTiles / (rows * cols));
}

// What a task owns: panels of channels by vectors of outputs.
struct TaskSize {
  int64_t panels, vectors;
};

// As large as possible, but every thread needs a task: large tasks transform less
// twice.
TaskSize choose_task_size(int64_t panels, int64_t vectors, int64_t max_vectors,
                          int64_t threads) {
  TaskSize size{std::min(panels, tuning::kWinogradPanels),
                std::min(vectors, max_vectors)};
  while (ceil_div(panels, size.panels) * ceil_div(vectors, size.vectors) < threads) {
    if (size.panels > 1)
      size.panels = ceil_div(size.panels, 2);
    else if (size.vectors > 1)
      size.vectors = ceil_div(size.vectors, 2);
    else
      break;
  }
  return size;
}

class Winograd {
 public:
  // `threads` only decides how much a task owns, never the result.
  Winograd(const GradMoments& moments, const Microkernels& kernels, int64_t threads);
  int64_t tasks() const { return columns_ * tasks_per_column_; }
  void run(int64_t task);
  std::vector<Part> lost() const;

 private:
  // Some channels of one column.
  struct Tile {
    int64_t channel, channels;
    int64_t output, outputs;
    int64_t width;  // outputs in whole vectors
  };

  // Of a task.
  struct Scratch {
    float* packed;
    float* input;  // of one panel of channels
    float* grad;
    float* sum;
    float* sum_sq;
    float* carry;          // sums of unfinished groups
    float* power;          // [panel][vector][3][lane], as the micro-kernel adds it
    float* largest_input;  // magnitude of each channel
    float* largest_grad;   // of each output
  };

  Tile tile_of(int64_t task) const;
  Scratch scratch() const;
  void transform_input(Block block, const Tile& tile, int64_t first,
                       const Scratch& scratch) const;
  void transform_grad(Block block, const Tile& tile, const Scratch& scratch) const;
  void multiply(const std::vector<Run>& runs, const Tile& tile, int64_t channel,
                const Scratch& scratch) const;
  void leave_out_lost(const Tile& tile, const Scratch& scratch);
  void clear_unmet(const Tile& tile, int64_t panel, int64_t lane,
                   const Scratch& scratch) const;
  void clear_unmet_of(const Tile& tile, int64_t channel, int64_t lane, float share,
                      const Scratch& scratch) const;
  AccumulatorTile target(const Tile& tile, float* accumulator) const;

  winograd::Grid grid_of(int64_t unit) const {
    return {units_.rows_of(unit), units_.cols, stride_};
  }
  int64_t unit_floats(int64_t width) const { return kPlaces * stride_ * width; }

  const GradMoments& moments_;
  const ConvShape& shape_;
  const Microkernels& kernels_;
  const winograd::Kernels& winograd_;
  const int64_t lanes_;  // channels of a panel
  const TaskSize task_;
  const int64_t column_;  // outputs of a full column
  const int64_t columns_;
  const int64_t task_channels_;
  const int64_t tasks_per_column_;
  const Units units_;
  const int64_t tiles_;   // of a full unit
  const int64_t stride_;  // tiles from one place to the next: odd, so that places lie
                          // in several sets of the cache
  const int64_t panels_, vectors_;  // in all
  std::vector<uint8_t> lost_;       // [vector][panel]
};

Winograd::Winograd(const GradMoments& moments, const Microkernels& kernels,
                   int64_t threads)
    : moments_(moments),
      shape_(moments.shape),
      kernels_(kernels),
      winograd_(kernels.winograd),
      lanes_(kernels.lanes),
      task_(choose_task_size(ceil_div(shape_.channels, lanes_),
                             ceil_div(shape_.outputs, lanes_), winograd_.max_vectors,
                             threads)),
      column_(task_.vectors * lanes_),
      columns_(ceil_div(shape_.outputs, column_)),
      task_channels_(task_.panels * lanes_),
      tasks_per_column_(ceil_div(shape_.channels, task_channels_)),
      units_(choose_units(shape_)),
      tiles_(units_.unit_rows * units_.cols),
      stride_(tiles_ | 1),
      panels_(ceil_div(shape_.channels, lanes_)),
      vectors_(ceil_div(shape_.outputs, lanes_)),
      lost_(panels_ * vectors_) {}

Winograd::Tile Winograd::tile_of(int64_t task) const {
  const int64_t channel = task % tasks_per_column_ * task_channels_;
  const int64_t output = task / tasks_per_column_ * column_;
  const int64_t outputs = std::min(column_, shape_.outputs - output);
  return {channel, std::min(task_channels_, shape_.channels - channel), output, outputs,
          round_up(outputs, lanes_)};
}

Winograd::Scratch Winograd::scratch() const {
  const int64_t packed = (units_.unit_rows * kEdge + kHalo) *
                         (units_.cols * kEdge + kHalo) * std::max(lanes_, column_);
  const int64_t input = units_.block_units * unit_floats(lanes_);
  const int64_t grad = units_.block_units * unit_floats(column_);
  const int64_t moments = task_channels_ * kTaps * column_;
  const int64_t power = 3 * task_.panels * column_;
  float* const all = scratch_floats(round_up(packed, 16) + input + grad + 3 * moments +
                                    power + task_channels_ + column_);
  float* const first = all + round_up(packed, 16);
  float* const sum = first + input + grad;
  return {all,
          first,
          first + input,
          sum,
          sum + moments,
          sum + 2 * moments,
          sum + 3 * moments,
          sum + 3 * moments + power,
          sum + 3 * moments + power + task_channels_};
}

void Winograd::run(int64_t task) {
  const Tile tile = tile_of(task);
  const Scratch own = scratch();
  std::fill_n(own.sum, task_channels_ * kTaps * tile.width, 0.f);
  std::fill_n(own.sum_sq, task_channels_ * kTaps * tile.width, 0.f);
  std::fill_n(own.power, 3 * task_.panels * tile.width, 0.f);
  std::fill_n(own.largest_input, task_channels_, 0.f);
  std::fill_n(own.largest_grad, tile.width, 0.f);
  for (int64_t u = 0; u < units_.count; u += units_.block_units) {
    const Block block = units_.block_at(u);
    const std::vector<Run> runs = units_.runs_of(block, tiles_);
    transform_grad(block, tile, own);
    for (int64_t c = 0; c < tile.channels; c += lanes_) {
      transform_input(block, tile, c, own);
      multiply(runs, tile, c, own);
    }
  }
  leave_out_lost(tile, own);
  target(tile, moments_.sum).add(kernels_, own.sum, tile.width);
  target(tile, moments_.sum_sq).add(kernels_, own.sum_sq, tile.width);
}

void Winograd::transform_grad(Block block, const Tile& tile, const Scratch& own) const {
  const ConvShape& s = shape_;
  for (int64_t unit = block.first; unit < block.last; ++unit) {
    const winograd::Grid grid = grid_of(unit);
    const Window window{units_.first_row_of(unit) * kEdge,
                        0,
                        grid.rows * kEdge,
                        grid.cols * kEdge,
                        1,
                        1};
    const Image image{moments_.grad, s.out_height, s.out_width, units_.sample_of(unit)};
    pack_lanes(image, {tile.output, 1, tile.outputs}, tile.width, window, kernels_,
               own.packed);
    winograd_.grad(own.packed, tile.width, grid,
                   own.grad + (unit - block.first) * unit_floats(tile.width),
                   own.largest_grad);
  }
}

// The panel that begins with the tile's channel `first`.
void Winograd::transform_input(Block block, const Tile& tile, int64_t first,
                               const Scratch& own) const {
  const ConvShape& s = shape_;
  const Channels panel{tile.channel + first, 1,
                       std::min(lanes_, tile.channels - first)};
  for (int64_t unit = block.first; unit < block.last; ++unit) {
    const winograd::Grid grid = grid_of(unit);
    const Window window{units_.first_row_of(unit) * kEdge - s.pad_h,
                        -s.pad_w,
                        grid.rows * kEdge + kHalo,
                        grid.cols * kEdge + kHalo,
                        1,
                        1};
    const Image image{moments_.input, s.height, s.width, units_.sample_of(unit)};
    pack_lanes(image, panel, lanes_, window, kernels_, own.packed);
    winograd_.input(own.packed, lanes_, grid,
                    own.input + (unit - block.first) * unit_floats(lanes_),
                    own.largest_input + first);
  }
}

// The same panel.
void Winograd::multiply(const std::vector<Run>& runs, const Tile& tile, int64_t first,
                        const Scratch& own) const {
  const int64_t rows = winograd_.rows;
  const winograd::MicroTile micro_tile = winograd_.micro_tile[tile.width / lanes_];
  const int64_t last = std::min(first + lanes_, tile.channels);
  float* const power = own.power + 3 * first / lanes_ * tile.width;
  for (int64_t c = first; c < last; c += rows) {
    const int64_t at = c * kTaps * tile.width;
    micro_tile({own.input + (c - first), own.grad, stride_}, runs.data(), runs.size(),
               own.sum + at, own.sum_sq + at, own.carry + at, power);
  }
}

float sum_of(const float* values, int64_t count) {
  return std::accumulate(values, values + count, 0.f);
}

// Whether the taps have too large an error: by the rounding of the products, or by what
// was taken for zero. Both are judged by their power.
bool is_lost(const float* power, int64_t lanes) {
  const float products = sum_of(power, lanes), taps = sum_of(power + lanes, lanes);
  const float zeros = sum_of(power + 2 * lanes, lanes);
  return !(std::isfinite(products) && products <= tuning::kWinogradMostLoss * taps &&
           zeros <= tuning::kWinogradMostZeros * taps);
}

// Notes which panels are lost for which vectors of outputs, and clears their moments.
void Winograd::leave_out_lost(const Tile& tile, const Scratch& own) {
  const int64_t vectors = tile.width / lanes_;
  for (int64_t c = 0; c < tile.channels; c += lanes_)
    for (int64_t v = 0; v < vectors; ++v) {
      if (!is_lost(own.power + 3 * (c / lanes_ * tile.width + v * lanes_), lanes_)) {
        clear_unmet(tile, c, v * lanes_, own);
        continue;
      }
      lost_[(tile.output / lanes_ + v) * panels_ + (tile.channel + c) / lanes_] = 1;
      const int64_t first = c * kTaps,
                    last = std::min(c + lanes_, tile.channels) * kTaps;
      for (int64_t row = first; row < last; ++row) {
        std::fill_n(own.sum + row * tile.width + v * lanes_, lanes_, 0.f);
        std::fill_n(own.sum_sq + row * tile.width + v * lanes_, lanes_, 0.f);
      }
    }
}

// Clears the moments of weights whose inputs meet no gradient, of one panel and one
// vector: they are rounding errors. Most of them were taken for zero tap by tap; but
// where products of several tiles cancel, what is left is small, and errors are not
// small beside it. Only weights with small moments are looked at.
void Winograd::clear_unmet(const Tile& tile, int64_t panel, int64_t lane,
                           const Scratch& own) const {
  const auto groups = static_cast<float>(ceil_div(shape_.samples, shape_.group_size));
  const auto tiles = static_cast<float>(units_.rows * units_.cols);
  const float error = tuning::kWinogradMostRounding * tiles * std::sqrt(groups);
  const float* const size = own.largest_grad + lane;
  const int64_t last = std::min(panel + lanes_, tile.channels);
  for (int64_t c = panel; c < last; ++c) {
    const float* const squares = own.sum_sq + c * kTaps * tile.width + lane;
    const float share = error * own.largest_input[c];
    if (share > 0 && winograd_.any_small(squares, tile.width, share, size))
      clear_unmet_of(tile, c, lane, share, own);
  }
}

// The same, of one channel.
void Winograd::clear_unmet_of(const Tile& tile, int64_t channel, int64_t lane,
                              float share, const Scratch& own) const {
  const int64_t last = std::min(lane + lanes_, tile.outputs);
  for (int64_t tap = 0; tap < kTaps; ++tap)
    for (int64_t o = lane; o < last; ++o) {
      const int64_t at = (channel * kTaps + tap) * tile.width + o;
      float &sum = own.sum[at], &sum_sq = own.sum_sq[at];
      const float most = share * own.largest_grad[o];
      if (sum_sq > most * most || (sum == 0 && sum_sq == 0)) continue;
      const Weight weight{tile.output + o, tile.channel + channel, tap / 3, tap % 3};
      if (!meets(moments_, weight)) sum = sum_sq = 0;
    }
}

// Lost panels that are neighbours become one part, and so do neighbouring vectors that
// have lost the same panels.
std::vector<Part> Winograd::lost() const {
  std::vector<Part> parts;
  for (int64_t v = 0; v < vectors_; ++v) {
    const uint8_t* const lost = lost_.data() + v * panels_;
    const int64_t output = v * lanes_, end = std::min(output + lanes_, shape_.outputs);
    for (int64_t p = 0, last; p < panels_; p = last + 1) {
      last = std::find(lost + p, lost + panels_, 0) - lost;
      if (last == p) continue;
      const int64_t channel = p * lanes_;
      const int64_t channels = std::min(last * lanes_, shape_.channels) - channel;
      const auto above =
          std::find_if(parts.begin(), parts.end(), [&](const Part& part) {
            return part.channel == channel && part.channels == channels &&
                   part.output + part.outputs == output;
          });
      if (above != parts.end())
        above->outputs = end - above->output;
      else
        parts.push_back({channel, channels, output, end - output});
    }
  }
  return parts;
}

AccumulatorTile Winograd::target(const Tile& tile, float* accumulator) const {
  const int64_t patch = shape_.patch();
  return {accumulator + tile.output * patch + tile.channel * kTaps, patch,
          tile.channels * kTaps, tile.outputs};
}

}  // namespace

std::vector<Part> accumulate_by_winograd(const GradMoments& moments,
                                         const Machine& machine) {
  Winograd winograd(moments, machine.kernels, machine.threads);
  for_each_task(machine.parallel, winograd.tasks(),
                [&](int64_t task) { winograd.run(task); });
  return winograd.lost();
}

}  // namespace fisherprune::cpu::grad_moments
