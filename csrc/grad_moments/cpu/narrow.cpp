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
#include "grad_moments/cpu/narrow_kernels.h"
#include "grad_moments/cpu/pack.h"
#include "grad_moments/cpu/tuning.h"

namespace fisherprune::cpu::grad_moments {
namespace {

// A column is as good as a row, and has longer vectors; so has an image of which
// nothing is skipped and no neighbour is met.
GradMoments laid_down(GradMoments m) {
  ConvShape& s = m.shape;
  if (s.width == 1 && s.out_width == 1 && s.kernel_w == 1 && s.pad_w == 0) {
    std::swap(s.height, s.width), std::swap(s.out_height, s.out_width);
    std::swap(s.kernel_h, s.kernel_w), std::swap(s.stride_h, s.stride_w);
    std::swap(s.pad_h, s.pad_w), std::swap(s.dilation_h, s.dilation_w);
    for (View4* v : {&m.input, &m.grad}) std::swap(v->stride[2], v->stride[3]);
  }
  const bool pointwise = s.kernel_h == 1 && s.kernel_w == 1 && s.stride_h == 1 &&
                         s.stride_w == 1 && s.pad_h == 0 && s.pad_w == 0;
  const auto dense = [&](const View4& v) {
    return v.stride[2] == s.width * v.stride[3];
  };
  if (pointwise && dense(m.input) && dense(m.grad)) {
    s.width = s.out_width = s.positions();
    s.height = s.out_height = 1;
  }
  return m;
}

// What the taps of an axis begin with, modulo the stride, without repetition.
std::vector<int64_t> phases_of(int64_t kernel, int64_t stride, int64_t dilation) {
  std::vector<int64_t> found;
  for (int64_t y = 0; y < kernel; ++y) {
    const int64_t phase = y * dilation % stride;
    if (std::find(found.begin(), found.end(), phase) != found.end()) break;
    found.push_back(phase);
  }
  return found;
}

int64_t phase_count(int64_t kernel, int64_t stride, int64_t dilation) {
  return phases_of(kernel, stride, dilation).size();
}

// Rows, or columns, that one plane has beyond the positions.
int64_t beyond(int64_t kernel, int64_t stride, int64_t dilation) {
  return (kernel - 1) * dilation / stride;
}

// How the planes of a call lie.
struct Planes {
  int64_t pitch;      // of a row, of the input and of the gradient
  int64_t beyond_h;   // rows of the input's planes beyond those of the output
  int64_t phases;     // planes of one channel
  int64_t unit_rows;  // of the output, packed at a time
  int64_t input, grad;  // floats of one plane

  int64_t length(int64_t rows, const ConvShape& s, int64_t lanes) const {
    return round_up((rows - 1) * pitch + s.out_width, lanes);
  }
};

// Floats of a group's packed channels and outputs for some rows of the output.
double floats_of(const ConvShape& s, int64_t rows) {
  const double cols = s.out_width + beyond(s.kernel_w, s.stride_w, s.dilation_w);
  const double input = phase_count(s.kernel_h, s.stride_h, s.dilation_h) *
                       phase_count(s.kernel_w, s.stride_w, s.dilation_w) *
                       (rows + beyond(s.kernel_h, s.stride_h, s.dilation_h)) * cols;
  return s.group_channels() * input + s.group_outputs() * rows * cols;
}

int64_t choose_unit_rows(const ConvShape& s, int64_t groups) {
  const double least = floats_of(s, 1) * groups;
  const double more = (floats_of(s, 2) - floats_of(s, 1)) * groups;
  const double most = (tuning::kNarrowFloats - least) / more + 1;
  const int64_t rows =
      std::clamp<double>(most, 1, static_cast<double>(s.out_height));
  return ceil_div(s.out_height, ceil_div(s.out_height, rows));
}

Planes planes_of(const ConvShape& s, int64_t groups, int64_t lanes) {
  Planes p{};
  p.pitch = s.out_width + beyond(s.kernel_w, s.stride_w, s.dilation_w);
  p.beyond_h = beyond(s.kernel_h, s.stride_h, s.dilation_h);
  p.phases = phase_count(s.kernel_h, s.stride_h, s.dilation_h) *
             phase_count(s.kernel_w, s.stride_w, s.dilation_w);
  p.unit_rows = choose_unit_rows(s, groups);
  p.input = (p.unit_rows + p.beyond_h) * p.pitch;
  p.grad = std::max(p.unit_rows * p.pitch, p.length(p.unit_rows, s, lanes));
  return p;
}

// Groups whose channels, or outputs, are about one vector.
int64_t groups_of_task(const ConvShape& s) {
  const int64_t wide = std::max(s.group_channels(), s.group_outputs());
  return std::min(s.groups, ceil_div(tuning::kNarrowChannels, wide));
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
    int64_t packed;  // floats of the first two
  };

  // Some rows of the output of one sample.
  struct Unit {
    int64_t sample, row, rows;
  };

  Scratch scratch() const;
  void take(const Unit& unit, ConvGroups groups, bool first, const Scratch& own) const;
  void pack(const View4& view, const Window& window, int64_t height, int64_t width,
            const Unit& unit, Channels channels, float* to, int64_t to_stride) const;
  void pack_input(const Unit& unit, ConvGroups groups, const Scratch& own) const;
  void pack_grad(const Unit& unit, ConvGroups groups, const Scratch& own) const;
  void multiply(const float* input, const float* grad, int64_t length, float* sums,
                bool add) const;
  void finish(ConvGroups groups, const Scratch& own);

  int64_t group_weights() const { return shape_.group_outputs() * shape_.patch(); }
  int64_t channel_floats() const { return planes_.phases * planes_.input; }

  const GradMoments moments_;
  const ConvShape& shape_;
  const narrow::Kernels& kernels_;
  const Microkernels& packing_;
  const int64_t most_groups_;  // of any task
  const int64_t task_groups_;
  const bool in_place_;        // rows of the image lie in memory as they are packed
  const int64_t pack_groups_;  // packed at a time
  const Planes planes_;
  std::vector<int64_t> base_;  // of each row of the patch
  std::vector<uint8_t> lost_;  // convolution groups
};

int64_t fair_groups(int64_t groups, int64_t most, int64_t threads) {
  return std::clamp<int64_t>(groups / (2 * threads), 1, most);
}

Narrow::Narrow(const GradMoments& moments, const narrow::Kernels& kernels,
               const Microkernels& packing, int64_t threads)
    : moments_(laid_down(moments)),
      shape_(moments_.shape),
      kernels_(kernels),
      packing_(packing),
      most_groups_(groups_of_task(shape_)),
      task_groups_(fair_groups(shape_.groups, most_groups_, threads)),
      in_place_(moments_.input.stride[1] != 1 && moments_.grad.stride[1] != 1),
      pack_groups_(in_place_ ? 1 : most_groups_),
      planes_(planes_of(shape_, pack_groups_, kernels.lanes)),
      lost_(shape_.groups) {
  const ConvShape& s = shape_;
  const auto rows = phases_of(s.kernel_h, s.stride_h, s.dilation_h);
  const auto cols = phases_of(s.kernel_w, s.stride_w, s.dilation_w);
  const auto place = [](const std::vector<int64_t>& phases, int64_t at) {
    return std::find(phases.begin(), phases.end(), at) - phases.begin();
  };
  for (int64_t c = 0; c < s.group_channels(); ++c)
    for (int64_t y = 0; y < s.kernel_h; ++y)
      for (int64_t x = 0; x < s.kernel_w; ++x) {
        const int64_t h = y * s.dilation_h, w = x * s.dilation_w;
        const int64_t phase = place(rows, h % s.stride_h) * cols.size() +
                              place(cols, w % s.stride_w);
        base_.push_back(c * channel_floats() + phase * planes_.input +
                        h / s.stride_h * planes_.pitch + w / s.stride_w);
      }
}

Narrow::Scratch Narrow::scratch() const {
  const int64_t lanes = kernels_.lanes;
  // A vector may begin at the last place of a plane.
  const int64_t input = round_up(
      pack_groups_ * shape_.group_channels() * channel_floats() + lanes, 16);
  const int64_t grad =
      round_up(pack_groups_ * shape_.group_outputs() * planes_.grad, 16);
  const int64_t weights = round_up(task_groups_ * group_weights(), lanes);
  float* const all = scratch_floats(input + grad + weights * (lanes + 2));
  float* const sums = all + input + grad;
  float* const moments = sums + weights * lanes;
  std::fill(all, sums, 0.f);
  std::fill(sums, moments + 2 * weights, 0.f);
  return {all, all + input, sums, moments, moments + weights, input + grad};
}

void Narrow::run(int64_t task) {
  const int64_t begin = task * task_groups_;
  const ConvGroups groups{begin, std::min(task_groups_, shape_.groups - begin)};
  const Scratch own = scratch();
  const int64_t samples = shape_.samples, size = std::min(shape_.group_size, samples);
  const int64_t weights = round_up(groups.count * group_weights(), kernels_.lanes);
  for (int64_t n = 0; n < samples; ++n) {
    for (int64_t p = 0; p < shape_.out_height; p += planes_.unit_rows) {
      const Unit unit{n, p, std::min(planes_.unit_rows, shape_.out_height - p)};
      take(unit, groups, n % size == 0 && p == 0, own);
    }
    if ((n + 1) % size != 0 && n + 1 != samples) continue;
    const float scale = 1.f / static_cast<float>(n % size + 1);
    kernels_.add_moments(own.sums, weights, scale, own.sum, own.sum_sq);
  }
  finish(groups, own);
}

void Narrow::take(const Unit& unit, ConvGroups groups, bool first,
                  const Scratch& own) const {
  const int64_t length = planes_.length(unit.rows, shape_, kernels_.lanes);
  for (int64_t g = 0; g < groups.count; g += pack_groups_) {
    const ConvGroups some{groups.first + g, std::min(pack_groups_, groups.count - g)};
    pack_input(unit, some, own);
    pack_grad(unit, some, own);
    for (int64_t i = 0; i < some.count; ++i)
      multiply(own.input + i * shape_.group_channels() * channel_floats(),
               own.grad + i * shape_.group_outputs() * planes_.grad, length,
               own.sums + (g + i) * group_weights() * kernels_.lanes, !first);
  }
}

// The entries [begin, end) of an axis of a window that lie inside of the image.
struct Inside {
  int64_t begin, end;
};

Inside inside_of(int64_t first, int64_t step, int64_t count, int64_t size) {
  const int64_t begin = first < 0 ? ceil_div(-first, step) : 0;
  const int64_t end = first < size ? ceil_div(size - first, step) : 0;
  return {std::min(begin, count), std::clamp(end, std::min(begin, count), count)};
}

void Narrow::pack(const View4& view, const Window& w, int64_t height, int64_t width,
                  const Unit& unit, Channels channels, float* to,
                  int64_t to_stride) const {
  if (!in_place_) {
    pack_planes({view, height, width, unit.sample}, channels, w, packing_, to,
                to_stride);
    return;
  }
  // What is outside is zero from the start, unless another unit lay there.
  const Inside rows = inside_of(w.h0, w.row_step, w.rows, height);
  const Inside cols = inside_of(w.w0, w.col_step, w.cols, width);
  const int64_t* s = view.stride;
  const int64_t bytes = view.dtype == Dtype::float32 ? 4 : 2;
  const int64_t first = unit.sample * s[0] + channels.first * s[1] +
                        (w.h0 + rows.begin * w.row_step) * s[2] +
                        (w.w0 + cols.begin * w.col_step) * s[3];
  narrow::Rows from{static_cast<const char*>(view.data) + first * bytes,
                    view.dtype,
                    s[2] * w.row_step,
                    s[3] * w.col_step,
                    rows.end - rows.begin,
                    cols.end - cols.begin};
  for (int64_t c = 0; c < channels.count; ++c, to += to_stride) {
    if (planes_.unit_rows < shape_.out_height) {
      std::fill(to, to + rows.begin * w.cols, 0.f);
      std::fill(to + rows.end * w.cols, to + w.rows * w.cols, 0.f);
    }
    kernels_.copy_rows(from, to + rows.begin * w.cols + cols.begin, w.cols);
    from.first = static_cast<const char*>(from.first) + s[1] * bytes;
  }
}

void Narrow::pack_input(const Unit& unit, ConvGroups groups, const Scratch& own) const {
  const ConvShape& s = shape_;
  float* to = own.input;
  for (const int64_t h : phases_of(s.kernel_h, s.stride_h, s.dilation_h))
    for (const int64_t w : phases_of(s.kernel_w, s.stride_w, s.dilation_w)) {
      const Window window{unit.row * s.stride_h - s.pad_h + h,
                          w - s.pad_w,
                          unit.rows + planes_.beyond_h,
                          planes_.pitch,
                          s.stride_h,
                          s.stride_w};
      pack(moments_.input, window, s.height, s.width, unit,
           {groups.first * s.group_channels(), 1, groups.count * s.group_channels()},
           to, channel_floats());
      to += planes_.input;
    }
}

void Narrow::pack_grad(const Unit& unit, ConvGroups groups, const Scratch& own) const {
  const ConvShape& s = shape_;
  const int64_t outputs = groups.count * s.group_outputs();
  pack(moments_.grad, {unit.row, 0, unit.rows, planes_.pitch, 1, 1}, s.out_height,
       s.out_width, unit, {groups.first * s.group_outputs(), 1, outputs}, own.grad,
       planes_.grad);
  // The last vector may reach beyond the last row.
  const int64_t end = planes_.length(unit.rows, s, kernels_.lanes);
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t i = unit.rows * planes_.pitch; i < end; ++i)
      own.grad[o * planes_.grad + i] = 0.f;
}

// All weights of one group of the convolution.
void Narrow::multiply(const float* input, const float* grad, int64_t length,
                      float* sums, bool add) const {
  const int64_t patch = shape_.patch(), lanes = kernels_.lanes;
  for (int64_t o = 0, some; o < shape_.group_outputs(); o += some) {
    const int64_t left = shape_.group_outputs() - o;
    some = left >= 4 ? 4 : left >= 2 ? 2 : 1;
    const int64_t rows = ceil_div(patch, ceil_div(patch, kernels_.most_rows[some]));
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
  return s.groups > 1 && s.group_outputs() <= tuning::kNarrowMostOutputs &&
         s.group_channels() <= tuning::kNarrowMostOutputs &&
         floats_of(s, 1) <= tuning::kNarrowMostFloats;
}

std::vector<ConvGroups> accumulate_narrow(const GradMoments& moments,
                                          Capability capability,
                                          const Machine& machine) {
  Narrow narrow(moments, narrow::kernels(capability), machine.kernels,
                machine.threads);
  for_each_task(machine.parallel, narrow.tasks(),
                [&](int64_t task) { narrow.run(task); });
  return narrow.lost();
}

}  // namespace fisherprune::cpu::grad_moments
