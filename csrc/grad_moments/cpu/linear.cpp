// Who does what. Samples are taken in blocks of whole groups. For each block, tasks
// pack the input as [panel of channels][position][lane]. Then each task owns some
// outputs and panels: it packs the gradient of its outputs as [position][output], or
// reads it where it lies so. Where groups have few positions it runs, a few outputs and
// a panel at a time, over the block with both moments in registers. Where they have
// many it takes a panel after the other, strip by strip of groups, with the moments of
// the panel in a tile.
//
// Memory traffic. The input is read once, the gradient as often as tasks share it. The
// packed gradient of a task and a panel stay in the second-level cache, those of a
// strip in the first-level cache. The accumulators are read and written once a block:
// where groups have few positions that is most of the traffic, and it is in their
// order.
//
// Every element has one owner, and its additions have one order: results are equal bit
// for bit, whatever the number of threads.
#include "grad_moments/cpu/linear.h"

#include <algorithm>
#include <utility>

#include "common/cpu/floats.h"
#include "common/integers.h"
#include "grad_moments/cpu/linear_kernels.h"
#include "grad_moments/cpu/pack.h"
#include "grad_moments/cpu/tuning.h"

namespace fisherprune::cpu::grad_moments {
namespace {

bool is_long(int64_t positions) { return positions >= tuning::kLinearLongGroup; }

// Samples of a block: whole groups, blocks of about equal size.
int64_t block_samples(const ConvShape& s, int64_t group) {
  const bool takes_long = is_long(group * s.positions());
  const bool is_small = s.outputs * s.channels <= tuning::kLinearSmallWeight;
  const int64_t floats = !takes_long ? tuning::kLinearInputFloats
                         : is_small  ? tuning::kLinearSmallInputFloats
                                     : tuning::kLinearLongInputFloats;
  const int64_t positions =
      takes_long ? tuning::kLinearLongPositions : tuning::kLinearMostPositions;
  const int64_t most =
      std::clamp(floats / s.channels, tuning::kLinearLeastPositions, positions);
  const int64_t groups = ceil_div(s.samples, group);
  const int64_t fit = std::max<int64_t>(1, most / (group * s.positions()));
  return ceil_div(groups, ceil_div(groups, fit)) * group;
}

int64_t panel_of(const linear::Kernels& kernels, int64_t positions) {
  if (positions == 1) return kernels.products.panel;
  return is_long(positions) ? kernels.long_groups[0][0].panel
                            : kernels.short_groups.panel;
}

// Tasks that share a column of outputs pack its gradient each.
int64_t choose_task_panels(int64_t panels, int64_t columns, int64_t threads) {
  return ceil_div(panels, std::clamp<int64_t>(4 * threads / columns, 1, panels));
}

// The samples [first, last).
struct Samples {
  int64_t first, last;
  int64_t count() const { return last - first; }
};

// The panels [first, last).
struct Panels {
  int64_t first, last;
};

// Some outputs, and what a task has of them in its own memory.
struct Column {
  int64_t first, outputs;
  const float *grad, *grad_sq;  // [position][output]
  int64_t grad_width;           // floats from one position to the next
  float *tile, *tile_sq;        // [output][channel of a panel]
};

class Linear {
 public:
  // `threads` only decides how many panels a task has, never the result.
  Linear(const GradMoments& moments, const linear::Kernels& kernels,
         const Machine& machine);
  void run();

 private:
  int64_t distance(const View4& view, int64_t row_step, int64_t col_step) const;
  void pack(const View4& view, int64_t height, int64_t width, int64_t row_step,
            int64_t col_step, Samples some, Channels channels, int64_t lanes,
            float* to) const;
  void pack_panel(Samples block, int64_t panel, Samples some) const;
  void pack_grad(Samples block, Channels channels, float* to) const;
  bool reads_in_place(int64_t outputs) const;
  void multiply(Samples block, int64_t task) const;
  void in_registers(Samples block, const Column& column, Panels panels) const;
  void in_tile(Samples block, const Column& column, int64_t panel) const;
  void multiply_strip(Samples block, Samples strip, const Column& column,
                      int64_t panel) const;
  void add_tile(const Column& column, int64_t panel) const;
  linear::Groups groups_of(Samples some) const;
  // Of a panel: the last one may be half as wide.
  int64_t width(int64_t panel) const {
    const int64_t half = kernels_.long_groups[1][0].panel;
    return long_ && shape_.channels - panel * panel_ <= half ? half : panel_;
  }
  float* packed(Samples block, int64_t panel) const {
    return input_ + panel * block.count() * positions_ * panel_;
  }

  const GradMoments& moments_;
  const ConvShape& shape_;
  const linear::Kernels& kernels_;
  const Machine& machine_;
  const int64_t positions_;  // of a sample
  const int64_t group_;      // samples, at most all
  const bool products_;      // groups of one position
  const bool long_;          // groups of many
  const int64_t block_;      // samples
  const int64_t strip_;      // samples
  const int64_t panel_;      // channels
  const int64_t panels_, columns_;
  const int64_t task_panels_;
  float* const input_;  // packed
};

Linear::Linear(const GradMoments& moments, const linear::Kernels& kernels,
               const Machine& machine)
    : moments_(moments),
      shape_(moments.shape),
      kernels_(kernels),
      machine_(machine),
      positions_(shape_.positions()),
      group_(std::min(shape_.group_size, shape_.samples)),
      products_(group_ * positions_ == 1),
      long_(is_long(group_ * positions_)),
      block_(block_samples(shape_, group_)),
      strip_(group_ * std::max<int64_t>(
                          1, tuning::kLinearStripPositions / (group_ * positions_))),
      panel_(panel_of(kernels, group_ * positions_)),
      panels_(ceil_div(shape_.channels, panel_)),
      columns_(ceil_div(shape_.outputs, tuning::kLinearOutputs)),
      task_panels_(choose_task_panels(panels_, columns_, machine.threads)),
      input_(shared_floats(block_ * positions_ * panels_ * panel_)) {}

void Linear::run() {
  for (int64_t n = 0; n < shape_.samples; n += block_) {
    const Samples block{n, std::min(n + block_, shape_.samples)};
    const int64_t strips = ceil_div(block.count(), strip_);
    for_each_task(machine_.parallel, panels_ * strips, [&](int64_t task) {
      const int64_t first = n + task % strips * strip_;
      pack_panel(block, task / strips, {first, std::min(first + strip_, block.last)});
    });
    for_each_task(machine_.parallel, columns_ * ceil_div(panels_, task_panels_),
                  [&](int64_t task) { multiply(block, task); });
  }
}

// Elements from one position to the next where all lie at equal distances, such as
// those of a linear layer; else 0.
int64_t Linear::distance(const View4& view, int64_t row_step, int64_t col_step) const {
  const ConvShape& s = shape_;
  const int64_t step = positions_ == 1    ? view.stride[0]
                       : s.out_width == 1 ? view.stride[2] * row_step
                                          : view.stride[3] * col_step;
  const bool line = s.out_height == 1 || s.out_width == 1;
  return line && view.stride[0] == positions_ * step ? step : 0;
}

// Some channels as [position][lane].
void Linear::pack(const View4& view, int64_t height, int64_t width, int64_t row_step,
                  int64_t col_step, Samples some, Channels channels, int64_t lanes,
                  float* to) const {
  const ConvShape& s = shape_;
  const int64_t count = positions_;
  if (const int64_t step = distance(view, row_step, col_step)) {
    View4 row = view;
    row.stride[3] = step;
    pack_lanes({row, 1, s.samples * count, 0}, channels, lanes,
               {0, some.first * count, 1, some.count() * count, 1, 1}, machine_.kernels,
               to);
    return;
  }
  for (int64_t n = some.first; n < some.last; ++n, to += count * lanes)
    pack_lanes({view, height, width, n}, channels, lanes,
               {0, 0, s.out_height, s.out_width, row_step, col_step}, machine_.kernels,
               to);
}

void Linear::pack_panel(Samples block, int64_t panel, Samples some) const {
  const ConvShape& s = shape_;
  const int64_t first = panel * panel_, lanes = width(panel);
  pack(moments_.input, s.height, s.width, s.stride_h, s.stride_w, some,
       {first, 1, std::min(lanes, s.channels - first)}, lanes,
       packed(block, panel) + (some.first - block.first) * positions_ * lanes);
}

linear::Groups Linear::groups_of(Samples some) const {
  const int64_t count = some.count() / group_, rest = some.count() % group_;
  return {count, group_ * positions_, rest * positions_,
          1.f / static_cast<float>(group_),
          1.f / static_cast<float>(std::max<int64_t>(rest, 1))};
}

// Whether a column's gradient can be read where it lies: kernels read their outputs,
// whether these exist or not, and positions far apart would share few places of a
// cache.
bool Linear::reads_in_place(int64_t outputs) const {
  const View4& grad = moments_.grad;
  const int64_t step = distance(grad, 1, 1);
  return !products_ && grad.dtype == Dtype::float32 && grad.stride[1] == 1 &&
         step > 0 && step <= tuning::kLinearMostDistance &&
         outputs % linear::kFewestOutputs == 0;
}

void Linear::pack_grad(Samples block, Channels channels, float* to) const {
  const ConvShape& s = shape_;
  pack(moments_.grad, s.out_height, s.out_width, 1, 1, block, channels,
       tuning::kLinearOutputs, to);
}

void Linear::multiply(Samples block, int64_t task) const {
  const View4& grad = moments_.grad;
  const int64_t first = task % columns_ * tuning::kLinearOutputs;
  const int64_t outputs = std::min(tuning::kLinearOutputs, shape_.outputs - first);
  const int64_t floats = block.count() * positions_ * tuning::kLinearOutputs;
  const int64_t tile = tuning::kLinearOutputs * panel_;
  float* const own = scratch_floats(2 * (floats + tile));
  float* const tiles = own + 2 * floats;
  Column column{first, outputs,     own, own + floats, tuning::kLinearOutputs,
                tiles, tiles + tile};
  if (reads_in_place(outputs)) {
    column.grad =
        static_cast<const float*>(grad.data) + block.first * grad.stride[0] + first;
    column.grad_width = distance(grad, 1, 1);
  } else {
    pack_grad(block, {first, 1, outputs}, own);
  }
  if (products_)
    for (int64_t i = 0; i < floats; ++i) own[floats + i] = own[i] * own[i];
  const int64_t begin = task / columns_ * task_panels_;
  const Panels panels{begin, std::min(begin + task_panels_, panels_)};
  if (!long_) return in_registers(block, column, panels);
  for (int64_t panel = panels.first; panel < panels.last; ++panel)
    in_tile(block, column, panel);
}

void Linear::in_registers(Samples block, const Column& column, Panels panels) const {
  const linear::KernelOf& kernel =
      products_ ? kernels_.products : kernels_.short_groups;
  const linear::Groups groups = groups_of(block);
  for (int64_t o = 0; o < column.outputs; o += kernel.outputs)
    for (int64_t panel = panels.first; panel < panels.last; ++panel) {
      const int64_t channel = panel * panel_;
      const int64_t at = (column.first + o) * shape_.channels + channel;
      kernel.run({packed(block, panel), column.grad + o, column.grad_sq + o,
                  column.grad_width, moments_.sum + at, moments_.sum_sq + at,
                  shape_.channels, column.outputs - o, shape_.channels - channel},
                 groups);
    }
}

void Linear::in_tile(Samples block, const Column& column, int64_t panel) const {
  std::fill_n(column.tile, 2 * tuning::kLinearOutputs * panel_, 0.f);
  for (int64_t n = block.first; n < block.last; n += strip_)
    multiply_strip(block, {n, std::min(n + strip_, block.last)}, column, panel);
  add_tile(column, panel);
}

void Linear::multiply_strip(Samples block, Samples strip, const Column& column,
                            int64_t panel) const {
  const int64_t lanes = width(panel);
  const auto& kernels = kernels_.long_groups[lanes < panel_];
  const linear::Groups groups = groups_of(strip);
  const int64_t position = (strip.first - block.first) * positions_;
  const float* const input = packed(block, panel) + position * lanes;
  const float* const grad = column.grad + position * column.grad_width;
  for (int64_t o = 0; o < column.outputs;) {
    int size = 0;  // the least that has all outputs that are left
    while (size + 1 < linear::kSizes && kernels[size].outputs < column.outputs - o)
      ++size;
    kernels[size].run(
        {input, grad + o, nullptr, column.grad_width, column.tile + o * lanes,
         column.tile_sq + o * lanes, lanes, kernels[size].outputs, lanes},
        groups);
    o += kernels[size].outputs;
  }
}

void Linear::add_tile(const Column& column, int64_t panel) const {
  const int64_t channel = panel * panel_, lanes = width(panel);
  const int64_t at = column.first * shape_.channels + channel;
  const int64_t channels = std::min(lanes, shape_.channels - channel);
  const std::pair<const float*, float*> both[] = {
      {column.tile, moments_.sum + at}, {column.tile_sq, moments_.sum_sq + at}};
  for (const auto& [tile, to] : both)
    kernels_.add(tile, lanes, column.outputs, channels, to, shape_.channels);
}

}  // namespace

bool linear_pays(const ConvShape& s) {
  return s.kernel_h == 1 && s.kernel_w == 1 && s.pad_h == 0 && s.pad_w == 0 &&
         s.groups == 1 && s.channels >= tuning::kLinearLeastChannels &&
         s.positions() <= tuning::kLinearGroupPositions &&
         s.positions() * std::min(s.group_size, s.samples) <=
             tuning::kLinearGroupPositions;
}

void accumulate_linear(const GradMoments& moments, Capability capability,
                       const Machine& machine) {
  Linear(moments, linear::kernels(capability), machine).run();
}

}  // namespace fisherprune::cpu::grad_moments
