// Made once in a call.
#include "grad_moments/cpu/narrow_planes.h"

#include <algorithm>
#include <utility>

#include "grad_moments/cpu/tuning.h"

namespace fisherprune::cpu::grad_moments {
namespace {

int64_t phase_count(int64_t kernel, int64_t stride, int64_t dilation) {
  return phases_of(kernel, stride, dilation).size();
}

// Rows, or columns, that one plane has beyond the positions.
int64_t beyond(int64_t kernel, int64_t stride, int64_t dilation) {
  return (kernel - 1) * dilation / stride;
}

// Units of equal size, for the second-level cache.
int64_t choose_unit_rows(const ConvShape& s, int64_t groups) {
  const double least = floats_of(s, 1) * groups;
  const double more = (floats_of(s, 2) - floats_of(s, 1)) * groups;
  const double most = (tuning::kNarrowFloats - least) / more + 1;
  const int64_t rows = std::clamp<double>(most, 1, static_cast<double>(s.out_height));
  return ceil_div(s.out_height, ceil_div(s.out_height, rows));
}

}  // namespace

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

std::vector<int64_t> phases_of(int64_t kernel, int64_t stride, int64_t dilation) {
  std::vector<int64_t> found;
  for (int64_t y = 0; y < kernel; ++y) {
    const int64_t phase = y * dilation % stride;
    if (std::find(found.begin(), found.end(), phase) != found.end()) break;
    found.push_back(phase);
  }
  return found;
}

double floats_of(const ConvShape& s, int64_t rows) {
  const double cols = s.out_width + beyond(s.kernel_w, s.stride_w, s.dilation_w);
  const double input = phase_count(s.kernel_h, s.stride_h, s.dilation_h) *
                       phase_count(s.kernel_w, s.stride_w, s.dilation_w) *
                       (rows + beyond(s.kernel_h, s.stride_h, s.dilation_h)) * cols;
  return s.group_channels() * input + s.group_outputs() * rows * cols;
}

Planes planes_of(const ConvShape& s, int64_t groups, int64_t lanes) {
  Planes p{};
  p.pitch = s.out_width + beyond(s.kernel_w, s.stride_w, s.dilation_w);
  p.beyond_h = beyond(s.kernel_h, s.stride_h, s.dilation_h);
  p.phases = phase_count(s.kernel_h, s.stride_h, s.dilation_h) *
             phase_count(s.kernel_w, s.stride_w, s.dilation_w);
  p.unit_rows = choose_unit_rows(s, groups);
  // A vector may begin at the last place.
  p.input = (p.unit_rows + p.beyond_h) * p.pitch + lanes;
  p.grad = p.unit_rows * p.pitch + lanes;
  return p;
}

}  // namespace fisherprune::cpu::grad_moments
