// Cuts the work into tiles and copies them.
#include "sparse_conv/cpu/tile.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/cpu/half_float.h"
#include "sparse_conv/cpu/kernels.h"

namespace fisherprune::cpu::sparse_conv {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class To, class T>
To converted(T value) {
  if constexpr (std::is_same_v<T, To>)
    return value;
  else
    return to_float(value);
}

template <class T, class To>
void copy_entries(const T* from, int64_t count, To* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = converted<To>(from[i]);
}

template <class T, class To>
void copy_places(const T* from, int64_t step, int64_t sample_stride, int64_t count,
                 int64_t samples, To* to) {
  if (step == samples && (samples == 1 || sample_stride == 1)) {
    copy_entries(from, count * samples, to);
  } else if (samples == 1 && step == 2) {
    for (int64_t i = 0; i < count; ++i) to[i] = converted<To>(from[i * 2]);
  } else if (samples == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = converted<To>(from[i * step]);
  } else if (sample_stride == 1) {
    for (int64_t i = 0; i < count; ++i)
      copy_entries(from + i * step, samples, to + i * samples);
  } else {
    for (int64_t n = 0; n < samples; ++n)
      for (int64_t i = 0; i < count; ++i)
        to[i * samples + n] = converted<To>(from[i * step + n * sample_stride]);
  }
}

// Copies places that are `step` entries apart to where they lie side by side.
template <class T>
void copy_row(const T* from, int64_t step, int64_t sample_stride, int64_t count,
              const Block& block, const Kernels& kernels, float* to) {
  constexpr bool is_float = std::is_same_v<T, float>;
  if (block.whole && (is_float || block.pairs)) {
    const Form& form = is_float ? kernels.floats : kernels.pairs;
    if (sample_stride == 1) return kernels.copy(from, step * sizeof(T), count, to);
    if (step == 1) return form.transpose(from, sample_stride, count, to);
  }
  if constexpr (std::is_same_v<T, BFloat16>)
    if (block.pairs)
      return copy_places(from, step, sample_stride, count, block.samples(),
                         reinterpret_cast<BFloat16*>(to));
  copy_places(from, step, sample_stride, count, block.lanes, to);
}

// The places of [first, first + count), with a step, that are in [0, size): from the
// `begin`-th to before the `end`-th.
struct Inside {
  Inside(int64_t first, int64_t step, int64_t count, int64_t size)
      : begin(std::min(count, first < 0 ? ceil_div(-first, step) : 0)),
        end(std::max(
            begin,
            std::min(count, first >= size ? 0 : (size - 1 - first) / step + 1))) {}
  int64_t begin, end;
};

void zero(float* to, int64_t count) {
  if (count) std::memset(to, 0, sizeof(float) * count);
}

// Where the part of a channel's plane that the image has lies, in entries of the image
// and in words of the tile.
struct Part {
  int64_t from, to, height, width;
};

std::vector<Part> parts_of(const View4& v, const Axis& y, const Axis& x,
                           const Tile& tile, const TileLayout& l) {
  std::vector<Part> parts;
  for (int64_t a = 0; a < l.planes_y; ++a)
    for (int64_t b = 0; b < l.planes_x; ++b) {
      const int64_t row = tile.row0 * y.split + y.planes[a] - y.before;
      const int64_t col = tile.col0 * x.split + x.planes[b] - x.before;
      const Inside rows(row, y.split, tile.rows + y.reach, y.size);
      const Inside cols(col, x.split, tile.cols + x.reach, x.size);
      if (rows.begin < rows.end && cols.begin < cols.end)
        parts.push_back({(row + rows.begin * y.split) * v.stride[2] +
                             (col + cols.begin * x.split) * v.stride[3],
                         l.place(0, a, b, rows.begin, cols.begin),
                         rows.end - rows.begin, cols.end - cols.begin});
    }
  return parts;
}

// Few samples: channels are made of zeros, and parts of the image put in.
template <class T>
void copy_few(const View4& v, const Axis& y, const Axis& x, const Tile& tile,
              const TileLayout& l, const Kernels& kernels, float* to) {
  const std::vector<Part> parts = parts_of(v, y, x, tile, l);
  const int64_t n = l.block.lanes, channel = l.place(1, 0, 0, 0, 0);
  const int64_t down = y.split * v.stride[2], along = x.split * v.stride[3];
  const bool side_by_side = along == n && (n == 1 || v.stride[0] == 1);
  const T* from = static_cast<const T*>(v.data) + tile.sample0 * v.stride[0] +
                  tile.channel0 * v.stride[1];
  for (int64_t c = 0; c < tile.channels; ++c, from += v.stride[1], to += channel) {
    zero(to, channel);
    for (const Part& part : parts) {
      const T* const first = from + part.from;
      if constexpr (std::is_same_v<T, float>)
        if (side_by_side) {
          kernels.copy_rows(first, down, part.height, part.width * n, to + part.to,
                            l.pitch);
          continue;
        }
      for (int64_t r = 0; r < part.height; ++r)
        copy_places(first + r * down, along, v.stride[0], part.width, n,
                    to + part.to + r * l.pitch);
    }
  }
  zero(to, kChunk);  // what runs on over the last channel
}

template <class T>
void copy_as(const View4& v, const Axis& y, const Axis& x, const Tile& tile,
             const TileLayout& l, const Kernels& kernels, float* to) {
  if (!l.block.whole) return copy_few<T>(v, y, x, tile, l, kernels, to);
  const T* const data = static_cast<const T*>(v.data) + tile.sample0 * v.stride[0];
  const int64_t rows = tile.rows + y.reach, cols = tile.cols + x.reach;
  const int64_t n = l.block.lanes, step = x.split * v.stride[3];
  for (int64_t c = 0; c < tile.channels; ++c)
    for (int64_t a = 0; a < l.planes_y; ++a)
      for (int64_t b = 0; b < l.planes_x; ++b) {
        const int64_t first = tile.col0 * x.split + x.planes[b] - x.before;
        const Inside in(first, x.split, cols, x.size);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t row = (tile.row0 + r) * y.split + y.planes[a] - y.before;
          float* const line = to + l.place(c, a, b, r, 0);
          if (row < 0 || row >= y.size || in.begin == in.end) {
            zero(line, cols * n);
            continue;
          }
          const T* const from = data + (tile.channel0 + c) * v.stride[1] +
                                row * v.stride[2] +
                                (first + in.begin * x.split) * v.stride[3];
          zero(line, in.begin * n);
          zero(line + in.end * n, (cols - in.end) * n);
          copy_row(from, step, v.stride[0], in.end - in.begin, l.block, kernels,
                   line + in.begin * n);
        }
      }
}

}  // namespace

Axis forward_axis(int64_t size, int64_t positions, int64_t kernel, int64_t stride,
                  int64_t pad, int64_t dilation) {
  Axis axis{size, stride,           pad,      dilation * (kernel - 1) / stride, {},
            1,    {{0, positions}}, positions};
  for (int64_t k = 0; k < std::min(kernel, stride); ++k) {
    const int64_t plane = k * dilation % stride;
    if (std::find(axis.planes.begin(), axis.planes.end(), plane) == axis.planes.end())
      axis.planes.push_back(plane);
  }
  return axis;
}

Axis spread_axis(int64_t size, int64_t positions, int64_t kernel, int64_t stride,
                 int64_t pad, int64_t dilation) {
  Axis axis{size, stride, pad, 0, {}, 1, {{0, positions}}, positions};
  for (int64_t k = 0; k < kernel; ++k) axis.planes.push_back(k * dilation);
  return axis;
}

Axis backward_axis(int64_t size, int64_t positions, int64_t kernel, int64_t stride,
                   int64_t pad, int64_t dilation) {
  // Grid e has the places h with (h + pad) % stride == e; place i of it takes position
  // i + (start + pad - y * dilation) / stride of the output for row y of the kernel.
  Axis axis{positions, 1, 0, 0, {0}, stride, {}, 0};
  const int64_t span = dilation * (kernel - 1);
  axis.before = std::max<int64_t>(0, ceil_div(span - pad, stride));
  int64_t last = 0;
  for (int64_t e = 0; e < stride; ++e) {
    const int64_t start = ((e - pad) % stride + stride) % stride;
    const int64_t count = start < size ? (size - 1 - start) / stride + 1 : 0;
    axis.grids.push_back({start, count});
    axis.count = std::max(axis.count, count);
    if (count) last = std::max(last, (start + pad) / stride);
  }
  axis.reach = axis.before + last;
  return axis;
}

TileLayout::TileLayout(const Axis& y, const Axis& x, const Cut& cut, const Block& block)
    : block(block),
      planes_y(y.planes.size()),
      planes_x(x.planes.size()),
      pitch((cut.cols + x.reach) * block.lanes),
      plane((cut.rows + y.reach) * pitch),
      words(cut.channels * planes_y * planes_x * plane + 2 * kMostChunks * kChunk) {}

void copy_tile(const View4& source, const Axis& y, const Axis& x, const Tile& tile,
               const TileLayout& layout, const Kernels& kernels, float* to) {
  if (source.dtype == Dtype::float32)
    copy_as<float>(source, y, x, tile, layout, kernels, to);
  else if (source.dtype == Dtype::bfloat16)
    copy_as<BFloat16>(source, y, x, tile, layout, kernels, to);
  else
    copy_as<Float16>(source, y, x, tile, layout, kernels, to);
}

}  // namespace fisherprune::cpu::sparse_conv
