// Each part has accumulators of its own, which are then added to those of the layer.
// Memory traffic beyond that of the plain way: two floats more are written and read for
// each weight of the part.
#include "grad_moments/cpu/parts.h"

#include <algorithm>

#include "common/cpu/floats.h"
#include "common/integers.h"
#include "grad_moments/cpu/plain.h"
#include "grad_moments/cpu/tuning.h"

namespace fisherprune::cpu::grad_moments {
namespace {

// Moves the first entry of a view.
void move(View4& view, int axis, int64_t entries) {
  const int64_t bytes = view.dtype == Dtype::float32 ? 4 : 2;
  view.data = static_cast<const char*>(view.data) + entries * view.stride[axis] * bytes;
}

// Where a part's weights lie in the accumulators of the layer: the first, from output
// to output, and from weight to weight of an output.
struct Place {
  int64_t first, output_step, step;
};

// Adds the moments of `part`, whose accumulators are still to be made.
void accumulate_at(const GradMoments& all, GradMoments part, const Place& place,
                   const Machine& machine) {
  const int64_t outputs = part.shape.outputs, patch = part.shape.patch();
  const int64_t size = outputs * patch;
  const Floats own = new_floats(2 * size);
  std::fill_n(own.get(), 2 * size, 0.f);
  part.sum = own.get();
  part.sum_sq = own.get() + size;
  accumulate_plainly(part, machine);
  for_each_task(machine.parallel, outputs, [&](int64_t o) {
    const int64_t to = place.first + o * place.output_step;
    for (int64_t i = 0; i < patch; ++i) {
      all.sum[to + i * place.step] += part.sum[o * patch + i];
      all.sum_sq[to + i * place.step] += part.sum_sq[o * patch + i];
    }
  });
}

// The positions of an axis at which a tap meets the image, and where the first does.
struct Meeting {
  int64_t first, count, at;
};

// `start` is where the tap lies at position 0; before the image where it is negative.
Meeting meeting_of(int64_t size, int64_t positions, int64_t stride, int64_t start) {
  const int64_t first = start < 0 ? ceil_div(-start, stride) : 0;
  const int64_t end = start < size ? ceil_div(size - start, stride) : 0;
  const int64_t count = std::max<int64_t>(std::min(end, positions) - first, 0);
  return {first, count, count ? start + first * stride : 0};
}

// The layer of one tap: a 1 x 1 kernel over what it meets.
GradMoments tap_of(const GradMoments& all, const Meeting& h, const Meeting& w) {
  GradMoments tap = all;
  ConvShape& s = tap.shape;
  s.kernel_h = s.kernel_w = s.dilation_h = s.dilation_w = 1;
  s.pad_h = s.pad_w = 0;
  s.height -= h.at, s.width -= w.at;
  s.out_height = h.count, s.out_width = w.count;
  move(tap.input, 2, h.at), move(tap.input, 3, w.at);
  move(tap.grad, 2, h.first), move(tap.grad, 3, w.first);
  return tap;
}

// Rows, or columns, that a sample's positions see.
double seen(int64_t positions, int64_t kernel, int64_t stride, int64_t dilation) {
  const int64_t step = kernel == 1 ? 1 : stride;
  return static_cast<double>((positions - 1) * step + (kernel - 1) * dilation + 1);
}

}  // namespace

void accumulate_part(const GradMoments& all, const Part& part, const Machine& machine) {
  const ConvShape& s = all.shape;
  GradMoments some = all;
  some.shape.channels = part.channels;
  some.shape.outputs = part.outputs;
  move(some.input, 1, part.channel);
  move(some.grad, 1, part.output);
  const int64_t taps = s.kernel_h * s.kernel_w;
  accumulate_at(all, some,
                {part.output * s.patch() + part.channel * taps, s.patch(), 1}, machine);
}

void accumulate_groups(const GradMoments& all, ConvGroups groups,
                       const Machine& machine) {
  const ConvShape& s = all.shape;
  GradMoments some = all;
  some.shape.groups = groups.count;
  some.shape.channels = groups.count * s.group_channels();
  some.shape.outputs = groups.count * s.group_outputs();
  move(some.input, 1, groups.first * s.group_channels());
  move(some.grad, 1, groups.first * s.group_outputs());
  some.sum += groups.first * s.group_outputs() * s.patch();
  some.sum_sq += groups.first * s.group_outputs() * s.patch();
  accumulate_plainly(some, machine);
}

bool is_mostly_padding(const ConvShape& s) {
  const double window = seen(s.out_height, s.kernel_h, s.stride_h, s.dilation_h) *
                        seen(s.out_width, s.kernel_w, s.stride_w, s.dilation_w);
  const double image = static_cast<double>(s.height) * static_cast<double>(s.width);
  return window > tuning::kMostPadding * image &&
         window * static_cast<double>(s.channels) > tuning::kPaddedFloats;
}

void accumulate_taps(const GradMoments& all, const Machine& machine) {
  const ConvShape& s = all.shape;
  const int64_t taps = s.kernel_h * s.kernel_w;
  for (int64_t tap = 0; tap < taps; ++tap) {
    const int64_t y = tap / s.kernel_w, x = tap % s.kernel_w;
    const Meeting h =
        meeting_of(s.height, s.out_height, s.stride_h, y * s.dilation_h - s.pad_h);
    const Meeting w =
        meeting_of(s.width, s.out_width, s.stride_w, x * s.dilation_w - s.pad_w);
    if (h.count > 0 && w.count > 0)
      accumulate_at(all, tap_of(all, h, w), {tap, s.patch(), taps}, machine);
  }
}

}  // namespace fisherprune::cpu::grad_moments
