// A task owns one tile: some rows of the patch by the lanes of a column. Memory
// traffic: for every micro-tile it reads the column's packed gradient (from the
// second-level cache) and the packed input of its rows. Both moments of the tile stay
// in the first-level cache and are added to the accumulators once.
#include "grad_moments/cpu/tiles.h"

#include <algorithm>
#include <numeric>

#include "common/integers.h"
#include "grad_moments/cpu/tuning.h"

namespace fisherprune::cpu::grad_moments {
namespace {

constexpr int64_t kTileFloats =
    std::max(tuning::kTileRows * tuning::kTileLanes,
             tuning::kShortTileRows* tuning::kShortTileLanes);

// The largest multiple of `rows` that a tile holds; less where there would be too few
// tasks for the threads.
int64_t choose_task_rows(int64_t rows, int64_t most, int64_t patch, int64_t columns,
                         int64_t threads) {
  const int64_t fair = ceil_div(patch, rows) * columns / (4 * threads);
  return std::clamp<int64_t>(fair, 1, most / rows) * rows;
}

}  // namespace

Tiles::Tiles(const Plan& plan, const Microkernels& kernels, int64_t threads)
    : plan_(plan),
      kernels_(kernels),
      patch_(plan.shape.patch()),
      places_(plan.positions.size()) {
  // The last column of a convolution group may be narrower, with taller micro-tiles.
  const int64_t rows = std::lcm(micro_tile(plan.columns.front()).rows,
                                micro_tile(plan.columns.back()).rows);
  const int64_t most = plan.short_runs ? tuning::kShortTileRows : tuning::kTileRows;
  task_rows_ =
      choose_task_rows(rows * places_, most, patch_, plan.columns.size(), threads);
  tasks_per_column_ = ceil_div(patch_, task_rows_);
  if (plan.carries)
    carry_ = new_floats(tasks_per_column_ * task_rows_ * plan.packed_lanes);
}

int64_t Tiles::tasks() const { return plan_.columns.size() * tasks_per_column_; }

Tiles::Tile Tiles::tile_of(int64_t task) const {
  const int64_t row = task % tasks_per_column_ * task_rows_;
  return {plan_.columns[task / tasks_per_column_], row,
          std::min(row + task_rows_, patch_)};
}

int64_t Tiles::width(const ColumnOfTiles& column) const {
  return column.vectors * kernels_.lanes;
}

MicroTileOf Tiles::micro_tile(const ColumnOfTiles& column) const {
  if (plan_.operand == Operand::lanes) return kernels_.depthwise;
  return (plan_.short_runs ? kernels_.short_runs : kernels_.broadcast)[column.vectors];
}

float* Tiles::carry_of(const Tile& tile) const {
  if (!carry_) return nullptr;
  return carry_.get() + tile.column.grad_lane * tasks_per_column_ * task_rows_ +
         tile.row * width(tile.column);
}

void Tiles::run(const Pass& pass, int64_t task) const {
  const Tile tile = tile_of(task);
  const int64_t floats = task_rows_ * width(tile.column);
  alignas(64) float sum[kTileFloats];
  alignas(64) float sum_sq[kTileFloats];
  std::fill_n(sum, floats, 0.f);
  if (pass.sum_sq) std::fill_n(sum_sq, floats, 0.f);
  const int64_t all = pass.runs.size();
  for (Runs runs{0, 0}; runs.last < all;) {
    runs = cached_runs(pass, runs.last, tile);
    micro_tiles(pass, runs, tile, sum, pass.sum_sq ? sum_sq : nullptr);
  }
  target(tile, pass.sum).add(kernels_, sum, width(tile.column));
  if (pass.sum_sq) target(tile, pass.sum_sq).add(kernels_, sum_sq, width(tile.column));
}

// As many runs as have their packed gradient in the second-level cache, at least one:
// every micro-tile of the task reads it again. Where little is done with each number of
// it, the first-level cache must hold it.
Tiles::Runs Tiles::cached_runs(const Pass& pass, int64_t first,
                               const Tile& tile) const {
  const int64_t bytes = plan_.short_runs ? tuning::kShortGradBytes : tuning::kGradBytes;
  const int64_t most = bytes / (width(tile.column) * 4);
  const int64_t begin = pass.runs[first].begin;
  int64_t last = first + 1;
  const int64_t all = pass.runs.size();
  while (last < all && pass.runs[last].end - begin <= most) ++last;
  return {first, last};
}

// The rows of a micro-tile have one list of positions: they are neighbours, or they lie
// places_ rows apart.
void Tiles::micro_tiles(const Pass& pass, Runs runs, const Tile& tile, float* sum,
                        float* sum_sq) const {
  const ColumnOfTiles& c = tile.column;
  const MicroTileOf micro = micro_tile(c);
  const float* const input =
      pass.input + c.input_row * plan_.input_stride() * plan_.input_lanes;
  const float* const grad = pass.grad + c.grad_lane * plan_.most_positions;
  const int64_t parts = ceil_div(tile.rows(), micro.rows * places_) * places_;
  float* const carry = carry_of(tile);
  for (int64_t part = 0; part < parts; ++part) {
    if (runs.first == 0) prefetch(pass, tile, part, parts);
    const int64_t place = part % places_;
    const int64_t row = part / places_ * micro.rows * places_ + place;
    int64_t base[kMostRows];
    for (int64_t r = 0; r < micro.rows;
         ++r)  // past the end rows repeat; add skips them
      base[r] = plan_.base[std::min(tile.row + row + r * places_, tile.end - 1)];
    const Positions& positions = plan_.positions[place];
    const Column operands{input,
                          grad,
                          positions.position.data(),
                          positions.offset.data(),
                          pass.places_of[place].data() + runs.first,
                          runs.last - runs.first,
                          places_ * width(c)};
    const int64_t at = row * width(c);
    micro.run(operands, base, sum + at, sum_sq ? sum_sq + at : nullptr,
              carry ? carry + at : nullptr);
  }
}

AccumulatorTile Tiles::target(const Tile& tile, float* accumulator) const {
  const ColumnOfTiles& c = tile.column;
  return {accumulator + c.first_output * patch_ + tile.row, c.output_step * patch_,
          tile.rows(), c.lanes};
}

void Tiles::prefetch(const Pass& pass, const Tile& tile, int64_t part,
                     int64_t parts) const {
  target(tile, pass.sum).prefetch(part, parts);
  if (pass.sum_sq) target(tile, pass.sum_sq).prefetch(part, parts);
}

}  // namespace fisherprune::cpu::grad_moments
