// Who does what. Samples are taken in blocks of whole groups. For each block, tasks
// pack the input as [panel of channels][position][lane]. Then each task owns some
// outputs and panels: it packs the gradient of its outputs as [position][output], and,
// panel by panel, runs over the block with both moments of a few outputs in registers.
//
// Memory traffic. The input is read once, the gradient as often as tasks share it. The
// packed gradient of a task and the panel stay in the second-level cache. The
// accumulators are read and written once a block: where there are many outputs that is
// most of the traffic, and it is in their order.
//
// Every element has one owner, and its additions have one order: results are equal bit
// for bit, whatever the number of threads.
#include "grad_moments/cpu/linear.h"

#include <algorithm>

#include "common/cpu/floats.h"
#include "common/integers.h"
#include "grad_moments/cpu/linear_kernels.h"
#include "grad_moments/cpu/pack.h"
#include "grad_moments/cpu/tuning.h"

namespace fisherprune::cpu::grad_moments {
namespace {

// Samples of a block: whole groups, blocks of about equal size.
int64_t block_samples(const ConvShape& s, int64_t group) {
  const int64_t most =
      std::clamp(tuning::kLinearInputFloats / s.channels, tuning::kLinearLeastPositions,
                 tuning::kLinearMostPositions);
  const int64_t groups = ceil_div(s.samples, group);
  const int64_t fit = std::max<int64_t>(1, most / (group * s.positions()));
  return ceil_div(groups, ceil_div(groups, fit)) * group;
}

class Linear {
 public:
  // `threads` only decides how many panels a task has, never the result.
  Linear(const GradMoments& moments, const linear::Kernels& kernels,
         const Machine& machine);
  void run();

 private:
  // The samples [first, last).
  struct Samples {
    int64_t first, last;
    int64_t count() const { return last - first; }
  };

  void pack(const View4& view, int64_t height, int64_t width, int64_t row_step,
            int64_t col_step, Samples block, Channels channels, int64_t lanes,
            float* to) const;
  void pack_panel(Samples block, int64_t panel) const;
  void multiply(Samples block, int64_t task) const;
  linear::Groups groups_of(Samples block) const;
  int64_t panel_floats(Samples block) const {
    return block.count() * shape_.positions() * kernels_.panel;
  }

  const GradMoments& moments_;
  const ConvShape& shape_;
  const linear::Kernels& kernels_;
  const Machine& machine_;
  const int64_t group_;  // samples, at most all
  const bool products_;  // groups of one position
  const int64_t block_;  // samples
  const int64_t panels_, columns_;
  const int64_t task_panels_;
  float* const input_;  // packed
};

// Tasks that share a column of outputs pack its gradient each.
int64_t choose_task_panels(int64_t panels, int64_t columns, int64_t threads) {
  return ceil_div(panels, std::clamp<int64_t>(4 * threads / columns, 1, panels));
}

Linear::Linear(const GradMoments& moments, const linear::Kernels& kernels,
               const Machine& machine)
    : moments_(moments),
      shape_(moments.shape),
      kernels_(kernels),
      machine_(machine),
      group_(std::min(shape_.group_size, shape_.samples)),
      products_(group_ * shape_.positions() == 1),
      block_(block_samples(shape_, group_)),
      panels_(ceil_div(shape_.channels, kernels.panel)),
      columns_(ceil_div(shape_.outputs, tuning::kLinearOutputs)),
      task_panels_(choose_task_panels(panels_, columns_, machine.threads)),
      input_(shared_floats(block_ * shape_.positions() * panels_ * kernels.panel)) {}

void Linear::run() {
  for (int64_t n = 0; n < shape_.samples; n += block_) {
    const Samples block{n, std::min(n + block_, shape_.samples)};
    for_each_task(machine_.parallel, panels_,
                  [&](int64_t panel) { pack_panel(block, panel); });
    for_each_task(machine_.parallel, columns_ * ceil_div(panels_, task_panels_),
                  [&](int64_t task) { multiply(block, task); });
  }
}

// Some channels as [position][lane]. Where all positions lie at equal distances, such
// as those of a linear layer, they are one row.
void Linear::pack(const View4& view, int64_t height, int64_t width, int64_t row_step,
                  int64_t col_step, Samples block, Channels channels, int64_t lanes,
                  float* to) const {
  const ConvShape& s = shape_;
  const int64_t count = s.positions();
  const bool line = s.out_height == 1 || s.out_width == 1;
  const int64_t step = count == 1         ? view.stride[0]
                       : s.out_width == 1 ? view.stride[2] * row_step
                                          : view.stride[3] * col_step;
  if (line && view.stride[0] == count * step) {
    View4 row = view;
    row.stride[3] = step;
    pack_lanes({row, 1, s.samples * count, 0}, channels, lanes,
               {0, block.first * count, 1, block.count() * count, 1, 1},
               machine_.kernels, to);
    return;
  }
  for (int64_t n = block.first; n < block.last; ++n, to += count * lanes)
    pack_lanes({view, height, width, n}, channels, lanes,
               {0, 0, s.out_height, s.out_width, row_step, col_step}, machine_.kernels,
               to);
}

void Linear::pack_panel(Samples block, int64_t panel) const {
  const ConvShape& s = shape_;
  const int64_t first = panel * kernels_.panel;
  pack(moments_.input, s.height, s.width, s.stride_h, s.stride_w, block,
       {first, 1, std::min(kernels_.panel, s.channels - first)}, kernels_.panel,
       input_ + panel * panel_floats(block));
}

linear::Groups Linear::groups_of(Samples block) const {
  const int64_t count = block.count() / group_, rest = block.count() % group_;
  return {count, group_ * shape_.positions(), rest * shape_.positions(),
          1.f / static_cast<float>(group_),
          1.f / static_cast<float>(std::max<int64_t>(rest, 1))};
}

void Linear::multiply(Samples block, int64_t task) const {
  const ConvShape& s = shape_;
  const int64_t column = task % columns_ * tuning::kLinearOutputs;
  const int64_t outputs = std::min(tuning::kLinearOutputs, s.outputs - column);
  const int64_t begin = task / columns_ * task_panels_;
  const int64_t end = std::min(begin + task_panels_, panels_);
  const int64_t floats = block.count() * s.positions() * tuning::kLinearOutputs;
  float* const grad = scratch_floats(2 * floats);
  float* const grad_sq = grad + floats;
  pack(moments_.grad, s.out_height, s.out_width, 1, 1, block, {column, 1, outputs},
       tuning::kLinearOutputs, grad);
  if (products_)
    for (int64_t i = 0; i < floats; ++i) grad_sq[i] = grad[i] * grad[i];
  const int64_t rows = products_ ? kernels_.product_outputs : kernels_.group_outputs;
  const linear::Kernel kernel = products_ ? kernels_.products : kernels_.groups;
  const linear::Groups groups = groups_of(block);
  for (int64_t o = 0; o < outputs; o += rows)
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t channel = panel * kernels_.panel;
      const int64_t at = (column + o) * s.channels + channel;
      kernel({input_ + panel * panel_floats(block), grad + o, grad_sq + o,
              tuning::kLinearOutputs, moments_.sum + at, moments_.sum_sq + at,
              s.channels, outputs - o, s.channels - channel},
             groups);
    }
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
