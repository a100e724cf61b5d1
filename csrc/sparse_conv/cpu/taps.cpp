// Lists the kept weights as they are, or sorts them by counting.
#include "sparse_conv/cpu/taps.h"

#include <algorithm>

namespace fisherprune::cpu::sparse_conv {
namespace {

// What a place in the kernel of an output channel adds to the index of a list, and to
// an offset.
struct Part {
  int64_t index, offset;
};

constexpr int64_t kLeastTaps = 4096;  // of a task

// The parts of all columns of a convolution group whose first channel is given:
// by_channel(c) and by_place(y, x) are those of the input's channel, and of the
// kernel's row and column. No weight is divided for.
template <class ByChannel, class ByPlace>
void append_columns(const SparseConvShape& s, int64_t first,
                    const ByChannel& by_channel, const ByPlace& by_place,
                    std::vector<Part>& columns) {
  for (int64_t c = first; c < first + s.group_channels(); ++c) {
    const Part channel = by_channel(c);
    for (int64_t y = 0; y < s.kernel_h; ++y)
      for (int64_t x = 0; x < s.kernel_w; ++x) {
        const Part place = by_place(y, x);
        columns.push_back({channel.index + place.index, channel.offset + place.offset});
      }
  }
}

// Where the lists are the rows of the pattern.
template <class ByChannel, class ByPlace>
TapLists listed(const SparseConvShape& s, const Pattern& pattern, const float* values,
                const ByChannel& by_channel, const ByPlace& by_place,
                const Parallel& parallel) {
  TapLists lists{1, 1, std::vector<Tap>(pattern.count), {}};
  lists.starts.assign(pattern.rows, pattern.rows + s.outputs + 1);
  std::vector<Part> all;
  const int64_t patch = s.group_channels() * s.kernel_h * s.kernel_w;
  all.reserve(s.groups * patch);
  for (int64_t g = 0; g < s.groups; ++g)
    append_columns(s, g * s.group_channels(), by_channel, by_place, all);
  const auto list = [&](int64_t o) {
    const Part* const columns = all.data() + o / s.group_outputs() * patch;
    for (int64_t i = pattern.rows[o]; i < pattern.rows[o + 1]; ++i)
      lists.taps[i] = {static_cast<int32_t>(columns[pattern.columns[i]].offset),
                       values ? values[i] : 0};
  };
  const int64_t tasks = std::clamp<int64_t>(pattern.count / kLeastTaps, 1, s.outputs);
  for_each_task(parallel, tasks, [&](int64_t i) {
    for (int64_t o = s.outputs * i / tasks; o < s.outputs * (i + 1) / tasks; ++o)
      list(o);
  });
  return lists;
}

// by_output(o) is the part of the output channel: the sums of all three say where a
// weight belongs. Two passes sort by counting.
template <class ByChannel, class ByPlace, class ByOutput>
TapLists sorted(const SparseConvShape& s, const Pattern& pattern, const float* values,
                int64_t grids, int64_t cuts, int64_t channels,
                const ByChannel& by_channel, const ByPlace& by_place,
                const ByOutput& by_output) {
  TapLists lists{grids, cuts, std::vector<Tap>(pattern.count), {}};
  lists.starts.assign(channels * grids * cuts + 1, 0);
  std::vector<Part> columns;
  const auto for_each_weight = [&](const auto& visit) {
    for (int64_t o = 0; o < s.outputs; ++o) {
      if (o % s.group_outputs() == 0) {
        columns.clear();
        const int64_t first = o / s.group_outputs() * s.group_channels();
        append_columns(s, first, by_channel, by_place, columns);
      }
      const Part output = by_output(o);
      for (int64_t i = pattern.rows[o]; i < pattern.rows[o + 1]; ++i) {
        const Part& column = columns[pattern.columns[i]];
        visit(output.index + column.index, i, output.offset + column.offset);
      }
    }
  };
  for_each_weight([&](int64_t index, int64_t, int64_t) { ++lists.starts[index + 1]; });
  for (size_t i = 1; i < lists.starts.size(); ++i)
    lists.starts[i] += lists.starts[i - 1];
  std::vector<int64_t> next(lists.starts.begin(), lists.starts.end() - 1);
  for_each_weight([&](int64_t index, int64_t i, int64_t offset) {
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
                      const TileLayout& layout, const Parallel& parallel) {
  const auto rows = forward_reads(y, s.kernel_h, s.stride_h, s.dilation_h);
  const auto cols = forward_reads(x, s.kernel_w, s.stride_w, s.dilation_w);
  const int64_t cuts = (s.channels + cut.channels - 1) / cut.channels;
  const auto by_channel = [&](int64_t c) {
    return Part{c / cut.channels, layout.place(c % cut.channels, 0, 0, 0, 0)};
  };
  const auto by_place = [&](int64_t ky, int64_t kx) {
    const Read &r = rows[ky], &q = cols[kx];
    return Part{0, layout.place(0, r.plane, q.plane, r.place, q.place)};
  };
  const auto by_output = [&](int64_t o) { return Part{o * cuts, 0}; };
  if (cuts == 1) return listed(s, pattern, values, by_channel, by_place, parallel);
  return sorted(s, pattern, values, 1, cuts, s.outputs, by_channel, by_place,
                by_output);
}

TapLists backward_taps(const SparseConvShape& s, const Pattern& pattern,
                       const float* values, const Axis& y, const Axis& x,
                       const Cut& cut, const TileLayout& layout) {
  const auto rows = backward_reads(y, s.kernel_h, s.stride_h, s.pad_h, s.dilation_h);
  const auto cols = backward_reads(x, s.kernel_w, s.stride_w, s.pad_w, s.dilation_w);
  const int64_t cuts = (s.outputs + cut.channels - 1) / cut.channels;
  const int64_t grids_x = x.grids.size(), grids = y.grids.size() * grids_x;
  const auto by_channel = [&](int64_t c) { return Part{c * grids * cuts, 0}; };
  const auto by_place = [&](int64_t ky, int64_t kx) {
    const Read &r = rows[ky], &q = cols[kx];
    return Part{(r.plane * grids_x + q.plane) * cuts,
                layout.place(0, 0, 0, r.place, q.place)};
  };
  const auto by_output = [&](int64_t o) {
    return Part{o / cut.channels, layout.place(o % cut.channels, 0, 0, 0, 0)};
  };
  return sorted(s, pattern, values, grids, cuts, s.channels, by_channel, by_place,
                by_output);
}

}  // namespace fisherprune::cpu::sparse_conv
