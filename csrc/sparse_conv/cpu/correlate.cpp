// The output, and the gradient of the input: sums over the taps of an output channel.
//
// A task copies a tile of the source and goes through all output channels; each of them
// is summed up in registers and written once for each cut of the source's channels.
#include <algorithm>
#include <vector>

#include "common/cpu/floats.h"
#include "common/cpu/half_float.h"
#include "sparse_conv/cpu/core.h"
#include "sparse_conv/cpu/few.h"
#include "sparse_conv/cpu/taps.h"
#include "sparse_conv/cpu/work.h"

namespace fisherprune::cpu::sparse_conv {
namespace {

// Bytes of an image that goes past the caches.
constexpr int64_t kLargeImage = 1 << 22;

struct Image {
  void* data;
  bool half;  // bfloat16, else float
  int64_t channels, height, width, samples;
  Epilogue epilogue;

  int64_t entry_bytes() const { return half ? 2 : 4; }

  // Whether all chunks are lines of memory, and the caches can't hold them.
  bool passes_caches() const {
    const int64_t row = samples * entry_bytes();
    return row % 64 == 0 && reinterpret_cast<uintptr_t>(data) % 64 == 0 &&
           channels * height * width * row >= kLargeImage;
  }
};

struct Job {
  const View4& source;
  const Image& image;
  const Work& work;
  const TapLists& taps;
  const Kernels& kernels;
  const Form& form;
};

// Where a grid's positions in a tile lie in the image, in entries.
struct Place {
  int64_t rows, cols;  // that are in the grid
  int64_t first, stride, step;
};

bool is_half(const View4& source) {
  return result_dtype(source.dtype) == Dtype::bfloat16;
}

char* entry_at(const Image& image, int64_t place) {
  return static_cast<char*>(image.data) + place * image.entry_bytes();
}

const char* residual_at(const Image& image, int64_t place) {
  return static_cast<const char*>(image.epilogue.residual) +
         place * image.entry_bytes();
}

Place place_of(const Job& job, const Tile& tile, int64_t channel, size_t gy,
               size_t gx) {
  const Axis &y = job.work.y, &x = job.work.x;
  const Image& m = job.image;
  const int64_t row = y.grids[gy].start + tile.row0 * y.step;
  const int64_t col = x.grids[gx].start + tile.col0 * x.step;
  const int64_t at =
      ((channel * m.height + row) * m.width + col) * m.samples + tile.sample0;
  return {std::min(tile.rows, y.grids[gy].count - tile.row0),
          std::min(tile.cols, x.grids[gx].count - tile.col0), at,
          y.step * m.width * m.samples, x.step * m.samples};
}

// How the sums of a cut of the channels begin and end.
struct Ends {
  float start;
  bool add;  // to what earlier cuts have written, else to the residual
  bool relu, past_caches;
};

// Chunks go from the registers to the image.
void correlate_chunks(const Job& job, const float* from, const Taps& taps,
                      const Place& to, const Ends& ends) {
  const Image& image = job.image;
  const int64_t pitch = job.work.layout.pitch;
  const Pieces pieces(to.rows, to.cols, job.form);
  pieces.for_each(
      [&](int64_t together, int64_t row, int64_t count, int64_t chunk, int64_t chunks) {
        const int64_t at = to.first + row * to.stride + chunk * to.step;
        const Rows rows{count,           from + row * pitch + chunk * kChunk,
                        pitch,           entry_at(image, at),
                        to.stride,       to.step,
                        ends.past_caches};
        const void* const before = ends.add                  ? entry_at(image, at)
                                   : image.epilogue.residual ? residual_at(image, at)
                                                             : nullptr;
        job.form.correlate[together][chunks](taps, rows, ends.start, before, ends.relu);
      });
}

void widen(const void* from, bool half, int64_t count, float* to) {
  if (half)
    std::transform(static_cast<const BFloat16*>(from),
                   static_cast<const BFloat16*>(from) + count, to,
                   [](BFloat16 value) { return to_float(value); });
  else
    std::copy_n(static_cast<const float*>(from), count, to);
}

void narrow(const float* from, bool half, int64_t count, void* to) {
  if (half)
    std::transform(from, from + count, static_cast<BFloat16*>(to), to_bfloat16);
  else
    std::copy_n(from, count, static_cast<float*>(to));
}

// Fewer samples: chunks run on over positions, and over what is between the rows, in a
// buffer that has the residual before, and the sums after that.
void correlate_rest(const Job& job, const float* from, const Taps& taps,
                    const Place& to, const Ends& ends, float* buffer) {
  const Image& image = job.image;
  const int64_t n = job.work.block.lanes, pitch = job.work.layout.pitch;
  const bool together = to.step == n;
  const int64_t pieces_of_row = together ? 1 : to.cols;
  const int64_t length = together ? to.cols * n : n;
  const auto for_each_piece = [&](const auto& each) {
    for (int64_t r = 0; r < to.rows; ++r)
      for (int64_t q = 0; q < pieces_of_row; ++q)
        each(to.first + r * to.stride + q * to.step, buffer + r * pitch + q * n);
  };
  const bool residual = image.epilogue.residual;
  if (residual)
    for_each_piece([&](int64_t at, float* own) {
      widen(residual_at(image, at), image.half, length, own);
    });
  const int64_t floats = (to.rows - 1) * pitch + to.cols * n;
  const Pieces pieces(1, (floats + kChunk - 1) / kChunk, job.form);
  pieces.for_each([&](int64_t, int64_t, int64_t, int64_t chunk, int64_t chunks) {
    float* const own = buffer + chunk * kChunk;
    const Rows rows{1, from + chunk * kChunk, 0, own, 0, kChunk};
    job.form.correlate[1][chunks](taps, rows, ends.start, residual ? own : nullptr,
                                  ends.relu);
  });
  for_each_piece([&](int64_t at, const float* own) {
    narrow(own, image.half, length, entry_at(image, at));
  });
}

// A tile, for the output channels from `begin` to before `end`.
void correlate_tile(const Job& job, int64_t index, int64_t begin, int64_t end,
                    float* scratch) {
  const Work& work = job.work;
  const Epilogue& epilogue = job.image.epilogue;
  Tile tile = work.tile(index);
  float* const buffer = scratch + work.layout.words;
  for (int64_t k = 0; k < work.cuts; ++k) {
    work.choose_channels(tile, k);
    copy_tile(job.source, work.y, work.x, tile, work.layout, job.kernels, scratch);
    const bool add = k > 0, last = k + 1 == work.cuts;
    const bool relu = epilogue.relu && last;
    const bool past_caches = last && job.image.passes_caches();
    for (int64_t o = begin; o < end; ++o) {
      const float start = epilogue.bias && !add ? epilogue.bias[o] : 0;
      const Ends ends{start, add, relu, past_caches};
      for (size_t gy = 0, grid = 0; gy < work.y.grids.size(); ++gy)
        for (size_t gx = 0; gx < work.x.grids.size(); ++gx, ++grid) {
          const Place to = place_of(job, tile, o, gy, gx);
          const Taps taps = job.taps.at(o, grid, k);
          if (to.rows <= 0 || to.cols <= 0 || (add && !taps.count && !relu)) continue;
          if (work.block.whole)
            correlate_chunks(job, scratch, taps, to, ends);
          else
            correlate_rest(job, scratch, taps, to, ends, buffer);
        }
    }
  }
  job.kernels.drain();
}

// make_taps(cut, layout) gives the taps of a kind of tile.
template <class MakeTaps>
void correlate(const View4& source, int64_t channels, const Axis& y, const Axis& x,
               int64_t count, const Image& image, const MakeTaps& make_taps,
               const Machine& machine) {
  if (!y.count || !x.count || !image.channels) return;
  const double taps_each = static_cast<double>(count) / image.channels;
  const Kernels& code = kernels(machine.capability);
  const auto run = [&](int64_t sample0, int64_t samples, const Block& block) {
    // What is rounded to bfloat16 is summed up before, and so are fewer samples.
    const bool cuts = block.whole && !block.pairs;
    const Load load{channels, image.channels, taps_each, block, cuts, false, code};
    const Work work(y, x, load, sample0, samples);
    const TapLists taps = make_taps(work.cut, work.layout);
    const Job job{source, image, work, taps, code, load.form()};
    const int64_t buffer = block.whole ? 0 : work.layout.plane + 2 * kChunk;
    const int64_t splits = splits_of(work.count(), image.channels, machine.threads);
    for_each_task(machine.parallel, work.count() * splits, [&](int64_t i) {
      float* const scratch = scratch_floats(work.layout.words + buffer);
      const int64_t split = i % splits;
      correlate_tile(job, i / splits, image.channels * split / splits,
                     image.channels * (split + 1) / splits, scratch);
    });
  };
  for_each_kind(image.samples, image.half, run);
}

}  // namespace

void output(const SparseConvShape& s, const View4& input, const Pattern& pattern,
            const float* values, const Epilogue& epilogue, void* output,
            const Machine& machine) {
  if (is_few(s, input))
    return few_output(s, input, pattern, values, epilogue, static_cast<float*>(output),
                      machine);
  const Axis y = forward_axis(s.height, s.out_height, s.kernel_h, s.stride_h, s.pad_h,
                              s.dilation_h);
  const Axis x =
      forward_axis(s.width, s.out_width, s.kernel_w, s.stride_w, s.pad_w, s.dilation_w);
  const Image image{output,      is_half(input), s.outputs, s.out_height,
                    s.out_width, s.samples,      epilogue};
  correlate(
      input, s.channels, y, x, pattern.count, image,
      [&](const Cut& cut, const TileLayout& layout) {
        return forward_taps(s, pattern, values, y, x, cut, layout, machine.parallel);
      },
      machine);
}

void input_gradient(const SparseConvShape& s, const View4& grad, const Pattern& pattern,
                    const float* values, void* grad_input, const Machine& machine) {
  const Axis y = backward_axis(s.height, s.out_height, s.kernel_h, s.stride_h, s.pad_h,
                               s.dilation_h);
  const Axis x = backward_axis(s.width, s.out_width, s.kernel_w, s.stride_w, s.pad_w,
                               s.dilation_w);
  const Image image{grad_input, is_half(grad), s.channels, s.height,
                    s.width,    s.samples,     {}};
  correlate(
      grad, s.outputs, y, x, pattern.count, image,
      [&](const Cut& cut, const TileLayout& layout) {
        return backward_taps(s, pattern, values, y, x, cut, layout);
      },
      machine);
}

}  // namespace fisherprune::cpu::sparse_conv
