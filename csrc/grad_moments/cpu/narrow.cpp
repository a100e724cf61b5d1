// Who does what. A task owns some groups of the convolution and takes all samples. It
// packs a group's image, padded with zeros, and its output gradient, as planes whose
// rows have one pitch: then a row of the patch is one address, and its sum over all
// positions one product of long vectors. What lies between the rows of the gradient is
// zero. Where the convolution has a stride, its phases are planes of their own. The
// sums of all weights wait as vectors until a group of samples ends; then their lanes
// are added up, and G and G * G to the task's moments. At the end of the task these are
// added to the accumulators.
//
// Memory traffic. Input and gradient are read once; planes, sums and moments stay in
// the caches of the first two levels. The accumulators are read and written once.
//
// Every element has one owner, and its additions have one order: results are equal bit
// for bit, whatever the number of threads.
#include "grad_moments/cpu/narrow.h"

#include <algorithm>
#include <cmath>

#include "common/cpu/floats.h"
#include "common/integers.h"
#include "grad_moments/cpu/inside.h"
#include "grad_moments/cpu/narrow_kernels.h"
#include "grad_moments/cpu/narrow_planes.h"
#include "grad_moments/cpu/pack.h"
#include "grad_moments/cpu/tuning.h"

namespace fisherprune::cpu::grad_moments {
namespace {

// Groups whose channels, or outputs, are about one vector of the widest.
int64_t groups_of_task(const ConvShape& s) {
  const int64_t wide = std::max(s.group_channels(), s.group_outputs());
  return std::min(s.groups, ceil_div(tuning::kNarrowChannels, wide));
}

// A window of the images of the input, or of the gradient, and its plane.
struct Piece {
  Piece(const Window& w, int64_t height, int64_t width, int64_t plane)
      : window(w),
        height(height),
        width(width),
        rows(inside_of(w.h0, w.row_step, w.rows, height)),
        cols(inside_of(w.w0, w.col_step, w.cols, width)),
        plane(plane) {}
  Window window;
  int64_t height, width;  // of the image
  Inside rows, cols;
  int64_t plane;  // floats before it
};

// Some rows of the output: the phases of the input that they meet.
struct Unit {
  std::vector<Piece> input, grad;
  int64_t length;  // places of the products
  int64_t end;     // of the rows in the gradient's plane
};

enum class Packing {
  rows,       // of the image lie in memory as they are packed
  transpose,  // channels lie side by side
  any,
};

Packing packing_of(const GradMoments& m, int64_t lanes, int64_t groups) {
  const ConvShape& s = m.shape;
  const auto both = [&](auto holds) { return holds(m.input) && holds(m.grad); };
  if (both([](const View4& v) { return v.stride[1] != 1; })) return Packing::rows;
  const bool whole = s.groups % groups == 0 &&
                     s.group_channels() * groups % lanes == 0 &&
                     s.group_outputs() * groups % lanes == 0;
  const bool dense = both(
      [](const View4& v) { return v.stride[1] == 1 && v.dtype == Dtype::float32; });
  return whole && dense ? Packing::transpose : Packing::any;
}

class Narrow {
 public:
  // `threads` only decides how much a task owns, never the result.
  Narrow(const GradMoments& moments, const narrow::Kernels& kernels,
         const Microkernels& packing, int64_t threads);
  int64_t tasks() const { return ceil_div(shape_.groups, task_groups_); }
  void run(int64_t task);
  std::vector<ConvGroups> lost() const;

 private:
  // Of a task.
  struct Scratch {
    float *input, *grad;  // packed: planes of some groups
    float* sums;          // [weight][lane]
    float *sum, *sum_sq;
  };

  Unit unit_at(int64_t row) const;
  void fill_base();
  Scratch scratch() const;
  void take(int64_t sample, const Unit& unit, ConvGroups groups, bool first,
            const Scratch& own) const;
  void pack(const View4& view, int64_t sample, const Piece& piece, Channels channels,
            float* to, int64_t to_stride) const;
  void clear_ends(const Unit& unit, int64_t planes, float* grad) const;
  void multiply(const float* input, const float* grad, int64_t length, float* sums,
                bool add) const;
  void finish(ConvGroups groups, const Scratch& own);

  int64_t group_weights() const { return shape_.group_outputs() * shape_.patch(); }
  int64_t channel_floats() const { return planes_.phases * planes_.input; }

  const GradMoments moments_;
  const ConvShape& shape_;
  const narrow::Kernels& kernels_;
  const Microkernels& microkernels_;
  const int64_t most_groups_;  // of any task
  const Packing packing_;
  const int64_t task_groups_;
  const int64_t pack_groups_;  // packed at a time
  const Planes planes_;
  const std::vector<int64_t> row_phases_, col_phases_;
  std::vector<Unit> units_;                           // of a sample
  std::vector<int64_t> base_;                         // of each row of the patch
  int64_t call_rows_[narrow::kMostOutputs + 1] = {};  // by the outputs of a call
  std::vector<uint8_t> lost_;                         // convolution groups
};

int64_t fair_groups(int64_t groups, int64_t most, int64_t threads) {
  return std::clamp<int64_t>(groups / (2 * threads), 1, most);
}

// Small images are packed several at a time, but large ones stay in the first-level
// cache.
int64_t groups_at_a_time(const ConvShape& s, int64_t most) {
  return std::clamp<double>(tuning::kNarrowGroupFloats / floats_of(s, s.out_height), 1,
                            static_cast<double>(most));
}

Narrow::Narrow(const GradMoments& moments, const narrow::Kernels& kernels,
               const Microkernels& microkernels, int64_t threads)
    : moments_(laid_down(moments)),
      shape_(moments_.shape),
      kernels_(kernels),
      microkernels_(microkernels),
      most_groups_(groups_of_task(shape_)),
      packing_(packing_of(moments_, kernels.lanes, most_groups_)),
      task_groups_(packing_ == Packing::rows
                       ? fair_groups(shape_.groups, most_groups_, threads)
                       : most_groups_),
      pack_groups_(packing_ == Packing::rows ? groups_at_a_time(shape_, most_groups_)
                                             : most_groups_),
      planes_(planes_of(shape_, pack_groups_, kernels.lanes)),
      row_phases_(phases_of(shape_.kernel_h, shape_.stride_h, shape_.dilation_h)),
      col_phases_(phases_of(shape_.kernel_w, shape_.stride_w, shape_.dilation_w)),
      lost_(shape_.groups) {
  for (int64_t row = 0; row < shape_.out_height; row += planes_.unit_rows)
    units_.push_back(unit_at(row));
  fill_base();
  // Calls of about equal size.
  for (int i = 0; i <= narrow::kMostOutputs; ++i)
    if (const int64_t most = kernels_.most_rows[i])
      call_rows_[i] = ceil_div(shape_.patch(), ceil_div(shape_.patch(), most));
}

Unit Narrow::unit_at(int64_t row) const {
  const ConvShape& s = shape_;
  const int64_t rows = std::min(planes_.unit_rows, s.out_height - row);
  Unit unit{{}, {}, planes_.length(rows, s, kernels_.lanes), rows * planes_.pitch};
  for (const int64_t h : row_phases_)
    for (const int64_t w : col_phases_)
      unit.input.push_back(
          {{row * s.stride_h - s.pad_h + h, w - s.pad_w, rows + planes_.beyond_h,
            planes_.pitch, s.stride_h, s.stride_w},
           s.height,
           s.width,
           static_cast<int64_t>(unit.input.size()) * planes_.input});
  unit.grad.push_back(
      {{row, 0, rows, planes_.pitch, 1, 1}, s.out_height, s.out_width, 0});
  return unit;
}

void Narrow::fill_base() {
  const ConvShape& s = shape_;
  const auto place = [](const std::vector<int64_t>& phases, int64_t at) {
    return std::find(phases.begin(), phases.end(), at) - phases.begin();
  };
  const int64_t cols = col_phases_.size();
  for (int64_t c = 0; c < s.group_channels(); ++c)
    for (int64_t y = 0; y < s.kernel_h; ++y)
      for (int64_t x = 0; x < s.kernel_w; ++x) {
        const int64_t h = y * s.dilation_h, w = x * s.dilation_w;
        const int64_t phase = place(row_phases_, h % s.stride_h) * cols +
                              place(col_phases_, w % s.stride_w);
        base_.push_back(c * channel_floats() + phase * planes_.input +
                        h / s.stride_h * planes_.pitch + w / s.stride_w);
      }
}

Narrow::Scratch Narrow::scratch() const {
  const int64_t lanes = kernels_.lanes;
  const int64_t input =
      round_up(pack_groups_ * shape_.group_channels() * channel_floats(), 16);
  const int64_t grad =
      round_up(pack_groups_ * shape_.group_outputs() * planes_.grad, 16);
  const int64_t weights = round_up(task_groups_ * group_weights(), lanes);
  const int64_t all = input + grad + weights * (lanes + 2);
  float* const first = scratch_floats(all);
  std::fill_n(first, all, 0.f);
  float* const sums = first + input + grad;
  float* const moments = sums + weights * lanes;
  return {first, first + input, sums, moments, moments + weights};
}

void Narrow::run(int64_t task) {
  const int64_t begin = task * task_groups_;
  const ConvGroups groups{begin, std::min(task_groups_, shape_.groups - begin)};
  const Scratch own = scratch();
  const int64_t samples = shape_.samples, size = std::min(shape_.group_size, samples);
  const int64_t weights = round_up(groups.count * group_weights(), kernels_.lanes);
  for (int64_t n = 0; n < samples; ++n) {
    for (const Unit& unit : units_)
      take(n, unit, groups, n % size == 0 && &unit == units_.data(), own);
    if ((n + 1) % size != 0 && n + 1 != samples) continue;
    const float scale = 1.f / static_cast<float>(n % size + 1);
    kernels_.add_moments(own.sums, weights, scale, own.sum, own.sum_sq);
  }
  finish(groups, own);
}

void Narrow::take(int64_t sample, const Unit& unit, ConvGroups groups, bool first,
                  const Scratch& own) const {
  const int64_t channels = shape_.group_channels(), outputs = shape_.group_outputs();
  for (int64_t g = 0; g < groups.count; g += pack_groups_) {
    const int64_t at = groups.first + g,
                  count = std::min(pack_groups_, groups.count - g);
    for (const Piece& piece : unit.input)
      pack(moments_.input, sample, piece, {at * channels, 1, count * channels},
           own.input + piece.plane, channel_floats());
    for (const Piece& piece : unit.grad)
      pack(moments_.grad, sample, piece, {at * outputs, 1, count * outputs}, own.grad,
           planes_.grad);
    if (units_.size() > 1) clear_ends(unit, count * outputs, own.grad);
    for (int64_t i = 0; i < count; ++i)
      multiply(own.input + i * channels * channel_floats(),
               own.grad + i * outputs * planes_.grad, unit.length,
               own.sums + (g + i) * group_weights() * kernels_.lanes, !first);
  }
}

// The last vector may reach beyond the rows, where those of another unit lay.
void Narrow::clear_ends(const Unit& unit, int64_t planes, float* grad) const {
  for (int64_t i = 0; i < planes; ++i, grad += planes_.grad)
    for (int64_t j = unit.end; j < unit.length; ++j) grad[j] = 0.f;
}

void Narrow::pack(const View4& view, int64_t sample, const Piece& piece,
                  Channels channels, float* to, int64_t to_stride) const {
  const Window& w = piece.window;
  if (packing_ == Packing::any) {
    pack_planes({view, piece.height, piece.width, sample}, channels, w, microkernels_,
                to, to_stride);
    return;
  }
  // What is outside is zero from the start, unless another unit lay there.
  if (units_.size() > 1)
    for (int64_t c = 0; c < channels.count; ++c) {
      float* const plane = to + c * to_stride;
      std::fill(plane, plane + piece.rows.begin * w.cols, 0.f);
      std::fill(plane + piece.rows.end * w.cols, plane + w.rows * w.cols, 0.f);
    }
  const int64_t* s = view.stride;
  const int64_t first = sample * s[0] + channels.first * s[1] +
                        (w.h0 + piece.rows.begin * w.row_step) * s[2] +
                        (w.w0 + piece.cols.begin * w.col_step) * s[3];
  const narrow::Rows from{static_cast<const char*>(view.data) +
                              first * (view.dtype == Dtype::float32 ? 4 : 2),
                          view.dtype,
                          s[2] * w.row_step,
                          s[3] * w.col_step,
                          s[1],
                          piece.rows.end - piece.rows.begin,
                          piece.cols.end - piece.cols.begin,
                          channels.count,
                          sample + 1 < shape_.samples ? s[0] : 0};
  const narrow::Place place{to + piece.rows.begin * w.cols + piece.cols.begin, w.cols,
                            to_stride};
  (packing_ == Packing::rows ? kernels_.copy_rows : kernels_.transpose_rows)(from,
                                                                             place);
}

// All weights of one group of the convolution.
void Narrow::multiply(const float* input, const float* grad, int64_t length,
                      float* sums, bool add) const {
  const int64_t patch = shape_.patch(), lanes = kernels_.lanes;
  for (int64_t o = 0, some; o < shape_.group_outputs(); o += some) {
    const int64_t left = shape_.group_outputs() - o;
    some = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    const int64_t rows = call_rows_[some];
    for (int64_t row = 0; row < patch; row += rows)
      kernels_.multiply[some][std::min(rows, patch - row)](
          input, base_.data() + row, grad + o * planes_.grad, planes_.grad, length,
          sums + (o * patch + row) * lanes, patch * lanes, add);
  }
}

void Narrow::finish(ConvGroups groups, const Scratch& own) {
  const int64_t count = group_weights();
  for (int64_t g = 0; g < groups.count; ++g) {
    const float* const sum = own.sum + g * count;
    const float* const sum_sq = own.sum_sq + g * count;
    // Where a gradient is not finite its square is not.
    const auto is_finite = [](float x) { return std::isfinite(x); };
    if (!std::all_of(sum_sq, sum_sq + count, is_finite)) {
      lost_[groups.first + g] = 1;
      continue;
    }
    const int64_t first = (groups.first + g) * count;
    for (int64_t i = 0; i < count; ++i) moments_.sum[first + i] += sum[i];
    for (int64_t i = 0; i < count; ++i) moments_.sum_sq[first + i] += sum_sq[i];
  }
}

std::vector<ConvGroups> Narrow::lost() const {
  std::vector<ConvGroups> found;
  for (auto at = lost_.begin(); (at = std::find(at, lost_.end(), 1)) != lost_.end();) {
    const auto end = std::find(at, lost_.end(), 0);
    found.push_back({at - lost_.begin(), end - at});
    at = end;
  }
  return found;
}

}  // namespace

bool narrow_pays(const ConvShape& s) {
  return s.groups > 1 && s.positions() >= tuning::kNarrowLeastPositions &&
         s.group_outputs() <= tuning::kNarrowMostOutputs &&
         s.group_channels() <= tuning::kNarrowMostOutputs &&
         floats_of(s, 1) <= tuning::kNarrowMostFloats;
}

std::vector<ConvGroups> accumulate_narrow(const GradMoments& moments,
                                          Capability capability,
                                          const Machine& machine) {
  Narrow narrow(moments, narrow::kernels(capability), machine.kernels, machine.threads);
  for_each_task(machine.parallel, narrow.tasks(),
                [&](int64_t task) { narrow.run(task); });
  return narrow.lost();
}

}  // namespace fisherprune::cpu::grad_moments
