// The plan is made once in a call. Its tables have an entry for each row of the patch
// and for each position of a block, so the time for it does not count.
#include "grad_moments/cpu/plan.h"

#include <algorithm>

#include "common/check.h"
#include "common/integers.h"
#include "grad_moments/cpu/tuning.h"

namespace fisherprune::cpu::grad_moments {
namespace {

// Where convolution groups have few outputs, most lanes would idle if each had an
// output: then each lane has a convolution group instead.
Operand choose_operand(const ConvShape& s, int64_t lanes) {
  if (s.groups == 1 || s.group_outputs() > lanes / 2) return Operand::broadcast;
  const int64_t idle_outputs = round_up(s.group_outputs(), lanes) * s.groups;
  const int64_t idle_groups = round_up(s.groups, lanes) * s.group_outputs();
  return idle_groups < idle_outputs ? Operand::lanes : Operand::broadcast;
}

void add_column(Plan& plan, ColumnOfTiles column, int64_t lanes) {
  column.vectors = ceil_div(column.lanes, lanes);
  column.grad_lane = plan.packed_lanes;
  plan.packed_lanes += column.vectors * lanes;
  plan.columns.push_back(column);
}

void columns_over_outputs(Plan& plan, const Microkernels& kernels) {
  const ConvShape& s = plan.shape;
  const int64_t width =
      kernels.lanes * (plan.short_runs ? kernels.short_vectors : kernels.max_vectors);
  plan.input_lanes = 1;
  plan.input_rows = s.channels;
  for (int64_t g = 0; g < s.groups; ++g)
    for (int64_t o = 0; o < s.group_outputs(); o += width)
      add_column(plan,
                 {g * s.group_outputs() + o, 1, std::min(width, s.group_outputs() - o),
                  0, g * s.group_channels(), 0},
                 kernels.lanes);
}

void columns_over_groups(Plan& plan, const Microkernels& kernels) {
  const ConvShape& s = plan.shape;
  plan.input_lanes = kernels.lanes;
  plan.input_rows = ceil_div(s.groups, kernels.lanes) * s.group_channels();
  for (int64_t g = 0; g < s.groups; g += kernels.lanes)
    for (int64_t o = 0; o < s.group_outputs(); ++o)
      add_column(plan,
                 {g * s.group_outputs() + o, s.group_outputs(),
                  std::min<int64_t>(kernels.lanes, s.groups - g), 0,
                  g / kernels.lanes * s.group_channels(), 0},
                 kernels.lanes);
}

// Samples are cut where the gradient of one column would leave the cache, or that of
// all columns would be more than the memory of a call. A block is as many samples as
// may be packed at a time.
Units choose_units(const Plan& plan, int64_t lanes_of_tile) {
  const ConvShape& s = plan.shape;
  const int64_t rows =
      std::min(tuning::kGradBytes / (s.out_width * lanes_of_tile * 4),
               tuning::kMostBlockBytes / (s.out_width * plan.packed_lanes * 4));
  const int64_t sample_bytes =
      (s.positions() * plan.packed_lanes +
       plan.input_window(0, s.out_height).size() * plan.input_rows * plan.input_lanes) *
      4;
  const int64_t bytes =
      s.patch() <= tuning::kTileRows ? tuning::kOneTileBlockBytes : tuning::kBlockBytes;
  const int64_t wanted =
      std::max(bytes / sample_bytes, ceil_div(tuning::kBlockPositions, s.positions()));
  // Products are summed over all samples alike.
  return units_of(s.samples, s.out_height, s.out_width,
                  plan.products ? s.samples : s.group_size, rows,
                  std::min(wanted, tuning::kMostBlockBytes / sample_bytes));
}

// How many rows (or columns) of the packed input lie between neighbouring positions:
// for kernels of one row (or column) what the stride skips is not packed.
int64_t step(int64_t kernel, int64_t stride) { return kernel == 1 ? 1 : stride; }

// The micro-kernels count what lies in a block of one packed channel in 32 bits.
void check_offsets(const Plan& plan) {
  const int64_t values = plan.input_stride() * plan.input_lanes;
  check(
      values <= INT32_MAX,
      "grad_moments: the input that the positions of one block see must have at most ",
      INT32_MAX, " values a channel, got ", values);
}

void fill_base(Plan& plan) {
  const ConvShape& s = plan.shape;
  const int64_t cols = plan.input_window(0, 1).cols;
  for (int64_t c = 0; c < s.group_channels(); ++c)
    for (int64_t y = 0; y < s.kernel_h; ++y)
      for (int64_t x = 0; x < s.kernel_w; ++x)
        plan.base.push_back(
            (c * plan.input_stride() + y * s.dilation_h * cols + x * s.dilation_w) *
            plan.input_lanes);
}

// The positions whose row p and column q are taken.
template <class Taken>
Positions positions_where(const Plan& plan, const Taken& taken) {
  const ConvShape& s = plan.shape;
  const int64_t row = plan.input_window(0, 1).cols * step(s.kernel_h, s.stride_h);
  const int64_t col = step(s.kernel_w, s.stride_w);
  Positions found;
  for (int64_t unit = 0; unit < plan.units.block_units; ++unit)
    for (int64_t p = 0; p < plan.units.unit_rows; ++p)
      for (int64_t q = 0; q < s.out_width; ++q) {
        if (!taken(p, q)) continue;
        found.position.push_back(
            static_cast<int32_t>((unit * plan.units.unit_rows + p) * s.out_width + q));
        found.offset.push_back(static_cast<int32_t>(
            (unit * plan.plane() + p * row + q * col) * plan.input_lanes));
      }
  return found;
}

// Those at which place (y, x) of the kernel is over the image.
Positions positions_inside(const Plan& plan, int64_t y, int64_t x) {
  const ConvShape& s = plan.shape;
  return positions_where(plan, [&](int64_t p, int64_t q) {
    const int64_t h = p * s.stride_h + y * s.dilation_h - s.pad_h;
    const int64_t w = q * s.stride_w + x * s.dilation_w - s.pad_w;
    return h >= 0 && h < s.height && w >= 0 && w < s.width;
  });
}

void fill_positions(Plan& plan) {
  const ConvShape& s = plan.shape;
  plan.positions = {positions_where(plan, [](int64_t, int64_t) { return true; })};
  const int64_t places = s.kernel_h * s.kernel_w;
  if (!plan.short_runs || places > tuning::kMostPlaces) return;
  std::vector<Positions> some;
  size_t inside = 0;
  for (int64_t y = 0; y < s.kernel_h; ++y)
    for (int64_t x = 0; x < s.kernel_w; ++x) {
      some.push_back(positions_inside(plan, y, x));
      inside += some.back().position.size();
    }
  if (inside < places * plan.positions[0].position.size()) plan.positions = some;
}

}  // namespace

std::vector<Run> Positions::places_of(const std::vector<Run>& runs) const {
  const auto place = [&](int32_t at) {
    return static_cast<int32_t>(std::lower_bound(position.begin(), position.end(), at) -
                                position.begin());
  };
  std::vector<Run> found = runs;
  for (Run& run : found) run.begin = place(run.begin), run.end = place(run.end);
  return found;
}

Window Plan::input_window(int64_t first, int64_t rows) const {
  const ConvShape& s = shape;
  const int64_t row_step = step(s.kernel_h, s.stride_h);
  const int64_t col_step = step(s.kernel_w, s.stride_w);
  return {first * s.stride_h - s.pad_h,
          -s.pad_w,
          (rows - 1) * row_step + (s.kernel_h - 1) * s.dilation_h + 1,
          (s.out_width - 1) * col_step + (s.kernel_w - 1) * s.dilation_w + 1,
          s.kernel_h == 1 ? s.stride_h : 1,
          s.kernel_w == 1 ? s.stride_w : 1};
}

Window Plan::input_window_of(int64_t unit) const {
  return input_window(units.first_row_of(unit), units.rows_of(unit));
}

Window Plan::grad_window_of(int64_t unit) const {
  return {units.first_row_of(unit), 0, units.rows_of(unit), shape.out_width, 1, 1};
}

int64_t Plan::plane() const { return input_window(0, units.unit_rows).size(); }

std::vector<Run> Plan::runs_of(Block block) const {
  std::vector<Run> runs = units.runs_of(block, tuning::kRunPositions);
  if (products)
    for (Run& run : runs) run = {run.begin, run.end, 1.f, false, true};
  return runs;
}

Plan plan_of(const ConvShape& shape, const Microkernels& kernels) {
  Plan plan{};
  plan.shape = shape;
  plan.operand = choose_operand(shape, kernels.lanes);
  plan.products = shape.positions() == 1 && shape.group_size == 1;
  plan.short_runs = kernels.short_vectors > 0 && !plan.products &&
                    plan.operand == Operand::broadcast &&
                    shape.positions() * std::min(shape.group_size, shape.samples) <=
                        tuning::kShortRunPositions;
  if (plan.operand == Operand::broadcast)
    columns_over_outputs(plan, kernels);
  else
    columns_over_groups(plan, kernels);
  plan.units = choose_units(plan, plan.columns[0].vectors * kernels.lanes);
  plan.most_positions = plan.units.positions_of(plan.units.block_at(0));
  check_offsets(plan);
  fill_base(plan);
  plan.carries = !plan.products && plan.units.carries(tuning::kRunPositions);
  plan.short_runs &= !plan.carries;
  fill_positions(plan);
  return plan;
}

}  // namespace fisherprune::cpu::grad_moments
