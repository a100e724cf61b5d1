// The output for few samples: lanes are positions and samples.
//
// A task copies a tile: for each column of the kernel what that reads for some rows of
// positions, row behind row, so that whatever a weight reads lies side by side. It goes
// through output channels: chunks of positions are summed up in registers, and written
// once. The kept weights are read as they are given, because to list them would take
// as long as to multiply by them.
#include "sparse_conv/cpu/few.h"

#include <algorithm>
#include <vector>

#include "common/cpu/floats.h"
#include "common/integers.h"
#include "sparse_conv/cpu/kernels.h"
#include "sparse_conv/cpu/tile.h"
#include "sparse_conv/cpu/work.h"

namespace fisherprune::cpu::sparse_conv {
namespace {

// Of the kernel: each has a copy of the image.
constexpr int64_t kMostColumns = 8;
// Floats of a tile, unless a row of positions reads more; and of that.
constexpr int64_t kTileFloats = 1 << 16, kMostFloats = 1 << 24;
// Products of a chunk and a weight, of a task: fewer take less time than another thread
// to begin.
constexpr int64_t kLeastProducts = 1 << 13;

struct Job {
  const SparseConvShape& s;
  const View4& input;
  const Pattern& pattern;
  const float* values;
  const Epilogue& epilogue;
  float* output;
  const Axis &y, &x;
  const TileLayout& layout;
  const std::vector<int32_t>& places;
  const Kernels& kernels;
};

int64_t tile_rows(const SparseConvShape& s, const Axis& y, const Axis& x) {
  const int64_t channels = s.channels * y.planes.size() * x.planes.size();
  const int64_t row = std::max<int64_t>(1, channels * x.count * s.samples);
  return std::clamp<int64_t>(kTileFloats / row - y.reach, 1, y.count);
}

// Where the weights of an output channel read, kept or not, from the tile's first
// channel of their convolution group.
std::vector<int32_t> places_of(const SparseConvShape& s, const Axis& y,
                               const TileLayout& layout) {
  std::vector<int32_t> places(s.group_channels() * s.kernel_h * s.kernel_w);
  auto place = places.begin();
  for (int64_t c = 0; c < s.group_channels(); ++c)
    for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
      const int64_t down = ky * s.dilation_h;
      const auto plane = std::find(y.planes.begin(), y.planes.end(), down % s.stride_h);
      for (int64_t kx = 0; kx < s.kernel_w; ++kx)
        *place++ = static_cast<int32_t>(
            layout.place(c, plane - y.planes.begin(), kx, down / s.stride_h, 0));
    }
  return places;
}

// Sums up `count` positions and samples of an output channel, which begin in the output
// at `at`.
void sum_channel(const Job& job, int64_t o, const float* tile, int64_t at,
                 int64_t count) {
  const Epilogue& end = job.epilogue;
  const int64_t first = job.pattern.rows[o];
  const Kept kept{job.values + first, job.pattern.columns + first, job.places.data(),
                  job.pattern.rows[o + 1] - first};
  const float start = end.bias ? end.bias[o] : 0;
  const auto* const residual = static_cast<const float*>(end.residual);
  const int64_t most = job.kernels.floats.most_chunks * kChunk;
  for (int64_t i = 0; i < count; i += most) {
    const int64_t floats = std::min(most, count - i), chunks = ceil_div(floats, kChunk);
    const float* before = residual ? residual + at + i : nullptr;
    float* to = job.output + at + i;
    float whole[kMostChunks * kChunk];  // where the last chunk is none in the output
    if (floats < chunks * kChunk) {
      std::fill_n(whole + (chunks - 1) * kChunk, kChunk, 0.f);
      if (before) job.kernels.copy_rows(before, 0, 1, floats, whole, 0), before = whole;
      to = whole;
    }
    job.kernels.sum[chunks](kept, tile + i, start, before, end.relu, to);
    if (to == whole) job.kernels.copy_rows(whole, 0, 1, floats, job.output + at + i, 0);
  }
}

// A tile, for the output channels from `begin` to before `end`.
void run(const Job& job, const Tile& tile, int64_t begin, int64_t end) {
  const SparseConvShape& s = job.s;
  float* const scratch = scratch_floats(job.layout.words);
  copy_tile(job.input, job.y, job.x, tile, job.layout, job.kernels, scratch);
  const int64_t row = s.out_width * s.samples;
  for (int64_t o = begin; o < end; ++o) {
    const int64_t channel = o / s.group_outputs() * s.group_channels();
    sum_channel(job, o, scratch + job.layout.place(channel, 0, 0, 0, 0),
                (o * s.out_height + tile.row0) * row, tile.rows * row);
  }
}

}  // namespace

bool is_few(const SparseConvShape& s, const View4& input) {
  return s.samples > 0 && s.samples < kChunk && s.kernel_w <= kMostColumns &&
         s.channels * s.kernel_h * s.out_width <= kMostFloats &&
         result_dtype(input.dtype) == Dtype::float32;
}

void few_output(const SparseConvShape& s, const View4& input, const Pattern& pattern,
                const float* values, const Epilogue& epilogue, float* output,
                const Machine& machine) {
  const Axis y = forward_axis(s.height, s.out_height, s.kernel_h, s.stride_h, s.pad_h,
                              s.dilation_h);
  const Axis x =
      spread_axis(s.width, s.out_width, s.kernel_w, s.stride_w, s.pad_w, s.dilation_w);
  const Cut cut{tile_rows(s, y, x), x.count, s.channels};
  const TileLayout layout =
      Work::checked(TileLayout(y, x, cut, {s.samples, false, false}));
  const std::vector<int32_t> places = places_of(s, y, layout);
  const Job job{s,
                input,
                pattern,
                values,
                epilogue,
                output,
                y,
                x,
                layout,
                places,
                kernels(machine.capability)};
  const int64_t tiles = ceil_div(y.count, cut.rows);
  const int64_t products =
      pattern.count * ceil_div(cut.rows * x.count * s.samples, kChunk);
  const int64_t splits = std::min(splits_of(tiles, s.outputs, machine.threads),
                                  std::max<int64_t>(1, products / kLeastProducts));
  for_each_task(machine.parallel, tiles * splits, [&](int64_t i) {
    const int64_t row0 = i / splits * cut.rows, split = i % splits;
    const Tile tile{row0,       0, std::min(cut.rows, y.count - row0), x.count, 0,
                    s.channels, 0};
    run(job, tile, s.outputs * split / splits, s.outputs * (split + 1) / splits);
  });
}

}  // namespace fisherprune::cpu::sparse_conv
