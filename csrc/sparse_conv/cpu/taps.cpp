// Sorts the kept weights by counting.
#include "sparse_conv/cpu/taps.h"

#include <algorithm>

namespace fisherprune::cpu::sparse_conv {
namespace {

// Calls visit(i, o, c, y, x) for each kept weight, c among the input's channels.
template <class Visit>
void for_each_weight(const SparseConvShape& s, const Pattern& pattern,
                     const Visit& visit) {
  const int64_t kernel = s.kernel_h * s.kernel_w;
  for (int64_t o = 0; o < s.outputs; ++o) {
    const int64_t group = o / s.group_outputs() * s.group_channels();
    for (int64_t i = pattern.rows[o]; i < pattern.rows[o + 1]; ++i) {
      const int64_t column = pattern.columns[i], place = column % kernel;
      visit(i, o, group + column / kernel, place / s.kernel_w, place % s.kernel_w);
    }
  }
}

// place(visit): calls visit(index, i, offset) for each weight, the same at each call.
template <class Place>
TapLists sorted(int64_t channels, int64_t grids, int64_t cuts, int64_t count,
                const float* values, const Place& place) {
  TapLists lists{grids, cuts, std::vector<Tap>(count), {}};
  lists.starts.assign(channels * grids * cuts + 1, 0);
  place([&](int64_t index, int64_t, int64_t) { ++lists.starts[index + 1]; });
  for (size_t i = 1; i < lists.starts.size(); ++i)
    lists.starts[i] += lists.starts[i - 1];
  std::vector<int64_t> next(lists.starts.begin(), lists.starts.end() - 1);
  place([&](int64_t index, int64_t i, int64_t offset) {
    lists.taps[next[index]++] = {static_cast<int32_t>(offset), values ? values[i] : 0};
  });
  return lists;
}

// What a row or column of the kernel reads: a plane, and a place in it.
struct Read {
  int64_t plane, place;
};

std::vector<Read> forward_reads(const Axis& axis, int64_t kernel, int64_t stride,
                                int64_t dilation) {
  std::vector<Read> reads;
  for (int64_t k = 0; k < kernel; ++k) {
    const auto plane =
        std::find(axis.planes.begin(), axis.planes.end(), k * dilation % stride);
    reads.push_back({plane - axis.planes.begin(), k * dilation / stride});
  }
  return reads;
}

// For the gradient: the grid that a row of the kernel serves takes the place of the
// plane.
std::vector<Read> backward_reads(const Axis& axis, int64_t kernel, int64_t stride,
                                 int64_t pad, int64_t dilation) {
  std::vector<Read> reads;
  for (int64_t k = 0; k < kernel; ++k) {
    const int64_t grid = k * dilation % stride;
    const int64_t shift = axis.grids[grid].start + pad - k * dilation;
    reads.push_back({grid, axis.before + shift / stride});  // divides exactly
  }
  return reads;
}

}  // namespace

TapLists forward_taps(const SparseConvShape& s, const Pattern& pattern,
                      const float* values, const Axis& y, const Axis& x, const Cut& cut,
                      const TileLayout& layout) {
  const auto rows = forward_reads(y, s.kernel_h, s.stride_h, s.dilation_h);
  const auto cols = forward_reads(x, s.kernel_w, s.stride_w, s.dilation_w);
  const int64_t cuts = (s.channels + cut.channels - 1) / cut.channels;
  return sorted(s.outputs, 1, cuts, pattern.count, values, [&](const auto& visit) {
    for_each_weight(
        s, pattern, [&](int64_t i, int64_t o, int64_t c, int64_t ky, int64_t kx) {
          const Read &r = rows[ky], &q = cols[kx];
          visit(o * cuts + c / cut.channels, i,
                layout.place(c % cut.channels, r.plane, q.plane, r.place, q.place));
        });
  });
}

TapLists backward_taps(const SparseConvShape& s, const Pattern& pattern,
                       const float* values, const Axis& y, const Axis& x,
                       const Cut& cut, const TileLayout& layout) {
  const auto rows = backward_reads(y, s.kernel_h, s.stride_h, s.pad_h, s.dilation_h);
  const auto cols = backward_reads(x, s.kernel_w, s.stride_w, s.pad_w, s.dilation_w);
  const int64_t cuts = (s.outputs + cut.channels - 1) / cut.channels;
  const int64_t grids_x = x.grids.size(), grids = y.grids.size() * grids_x;
  return sorted(s.channels, grids, cuts, pattern.count, values, [&](const auto& visit) {
    for_each_weight(s, pattern,
                    [&](int64_t i, int64_t o, int64_t c, int64_t ky, int64_t kx) {
                      const Read &r = rows[ky], &q = cols[kx];
                      const int64_t grid = r.plane * grids_x + q.plane;
                      visit((c * grids + grid) * cuts + o / cut.channels, i,
                            layout.place(o % cut.channels, 0, 0, r.place, q.place));
                    });
  });
}

}  // namespace fisherprune::cpu::sparse_conv
