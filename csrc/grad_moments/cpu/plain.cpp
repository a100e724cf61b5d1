// Who does what. Samples are taken in blocks. For each block, tasks first pack the
// input, padded with zeros, as [channel][sample][position], and the output gradient as
// [column of tiles][position of all samples][lane]. Then each task owns a tile: up to
// kTileRows rows of the patch by kTileLanes outputs, whose two moments fit in the
// first-level cache. For a few of its rows at a time it runs over all samples of the
// block: the micro-kernel holds the sums of one group in registers and adds G and G * G
// to the tile. At the end of the block the task transposes the tile and adds it to the
// accumulators.
//
// Memory traffic. Input and gradient are read once and written once in packed form.
// Every patch row of a tile reads the packed input of its channel in place (no im2col);
// the column's packed gradient comes from the second-level cache once for every 6 rows.
// The accumulators are read and written once a block, never once a sample.
//
// Every element has one owner, and its additions have one order: results are equal bit
// for bit, whatever the number of threads.
#include "grad_moments/cpu/plain.h"

#include <algorithm>

#include "common/cpu/floats.h"
#include "common/integers.h"
#include "grad_moments/cpu/pack.h"
#include "grad_moments/cpu/tiles.h"
#include "grad_moments/cpu/tuning.h"

namespace fisherprune::cpu::grad_moments {
namespace {

// One call: it packs, and it orders the steps.
class Call {
 public:
  Call(const GradMoments& moments, const Machine& machine)
      : moments_(moments),
        kernels_(machine.kernels),
        parallel_(machine.parallel),
        plan_(plan_of(moments.shape, kernels_)),
        tiles_(plan_, kernels_, machine.threads),
        input_(scratch_floats(input_size() + grad_size())),
        grad_(input_ + input_size()) {}

  void run();

 private:
  void pack(Block block);
  void pack_input(int64_t first, int64_t place, const Image& image,
                  Window window) const;
  void pack_grad(const ColumnOfTiles& column, int64_t place, const Image& image,
                 Window window) const;
  void square_packed();
  void multiply(Block block, float* sum, float* sum_sq);
  int64_t input_size() const {
    return plan_.input_rows * plan_.input_stride() * plan_.input_lanes;
  }
  int64_t grad_size() const { return plan_.most_positions * plan_.packed_lanes; }

  const GradMoments& moments_;
  const Microkernels& kernels_;
  const Parallel& parallel_;
  const Plan plan_;
  const Tiles tiles_;
  float *const input_, *const grad_;  // packed
};

void Call::run() {
  for (int64_t u = 0; u < plan_.units.count; u += plan_.units.block_units) {
    const Block block = plan_.units.block_at(u);
    pack(block);
    multiply(block, moments_.sum, plan_.products ? nullptr : moments_.sum_sq);
    if (!plan_.products) continue;
    square_packed();
    multiply(block, moments_.sum_sq, nullptr);
  }
}

// Whether samples have one position each, such as those of a plain linear layer. They
// are packed together, as one sample that has them as its positions.
bool single(int64_t height, int64_t width, Window w) {
  return height == 1 && width == 1 && w.h0 == 0 && w.w0 == 0 && w.size() == 1;
}

Image samples_as_row(const View4& view, int64_t samples) {
  View4 row = view;
  row.stride[3] = view.stride[0];
  return {row, 1, samples, 0};
}

void Call::pack(Block block) {
  const ConvShape& s = plan_.shape;
  const bool row_in = single(s.height, s.width, plan_.input_window(0, 1));
  const bool row_out = s.positions() == 1;
  const int64_t in_units = row_in ? 1 : block.units();
  const int64_t out_units = row_out ? 1 : block.units();
  const int64_t in_tasks = in_units * ceil_div(plan_.input_rows, tuning::kPackChannels);
  const int64_t out_tasks = out_units * static_cast<int64_t>(plan_.columns.size());
  const Window row{0, block.first, 1, block.units(), 1, 1};
  for_each_task(parallel_, in_tasks + out_tasks, [&](int64_t task) {
    const bool is_input = task < in_tasks;
    if (!is_input) task -= in_tasks;
    const int64_t place = task % (is_input ? in_units : out_units);
    const int64_t unit = block.first + place, sample = plan_.units.sample_of(unit);
    if (is_input) {
      const Image image{moments_.input, s.height, s.width, sample};
      pack_input(task / in_units * tuning::kPackChannels, place,
                 row_in ? samples_as_row(moments_.input, s.samples) : image,
                 row_in ? row : plan_.input_window_of(unit));
    } else {
      const Image image{moments_.grad, s.out_height, s.out_width, sample};
      pack_grad(plan_.columns[task / out_units], place,
                row_out ? samples_as_row(moments_.grad, s.samples) : image,
                row_out ? row : plan_.grad_window_of(unit));
    }
  });
}

// A few channels of the input, from packed row `first` on.
void Call::pack_input(int64_t first, int64_t place, const Image& image,
                      Window window) const {
  const ConvShape& s = plan_.shape;
  const int64_t last = std::min(first + tuning::kPackChannels, plan_.input_rows);
  const int64_t stride = plan_.input_stride() * plan_.input_lanes;
  float* to = input_ + first * stride + place * plan_.plane() * plan_.input_lanes;
  if (plan_.operand == Operand::broadcast) {
    pack_planes(image, {first, 1, last - first}, window, kernels_, to, stride);
    return;
  }
  for (int64_t row = first; row < last; ++row, to += stride) {
    const int64_t group = row / s.group_channels() * kernels_.lanes;
    const int64_t channel = group * s.group_channels() + row % s.group_channels();
    const int64_t lanes = std::min<int64_t>(kernels_.lanes, s.groups - group);
    pack_lanes(image, {channel, s.group_channels(), lanes}, kernels_.lanes, window,
               kernels_, to);
  }
}

void Call::pack_grad(const ColumnOfTiles& column, int64_t place, const Image& image,
                     Window window) const {
  const int64_t width = column.vectors * kernels_.lanes;
  // Only blocks of one unit have units of fewer rows.
  const int64_t position = place * plan_.units.unit_rows * plan_.shape.out_width;
  pack_lanes(image, {column.first_output, column.output_step, column.lanes}, width,
             window, kernels_,
             grad_ + column.grad_lane * plan_.most_positions + position * width);
}

void square(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] *= values[i];
}

void Call::square_packed() {
  using tuning::kSquarePiece;
  const int64_t pieces = ceil_div(input_size(), kSquarePiece);
  const int64_t all = pieces + ceil_div(grad_size(), kSquarePiece);
  for_each_task(parallel_, all, [&](int64_t task) {
    const bool is_input = task < pieces;
    const int64_t begin = (is_input ? task : task - pieces) * kSquarePiece;
    const int64_t size = is_input ? input_size() : grad_size();
    square((is_input ? input_ : grad_) + begin, std::min(kSquarePiece, size - begin));
  });
}

void Call::multiply(Block block, float* sum, float* sum_sq) {
  Pass pass{input_, grad_, plan_.runs_of(block), {}, sum, sum_sq};
  for (const Positions& some : plan_.positions)
    pass.places_of.push_back(some.places_of(pass.runs));
  for_each_task(parallel_, tiles_.tasks(),
                [&](int64_t task) { tiles_.run(pass, task); });
}

}  // namespace

void accumulate_plainly(const GradMoments& moments, const Machine& machine) {
  Call(moments, machine).run();
}

}  // namespace fisherprune::cpu::grad_moments
