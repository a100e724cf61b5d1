// A task packs a few channels of one sample. Memory traffic: one read of the source and
// one write in packed form. Where neither the order nor the dtype of the source fits,
// the data goes through a chunk in the first-level cache. The dense float32 layouts,
// NCHW and channels_last, have direct paths: in convolutions of few multiplications
// most of the time is packing.
#include "grad_moments/cpu/pack.h"

#include <algorithm>

#include "common/cpu/half_float.h"
#include "common/integers.h"
#include "grad_moments/cpu/tuning.h"

namespace fisherprune::cpu::grad_moments {
namespace {

// The columns of a window that lie inside the image: [begin, end).
struct Inside {
  int64_t begin, end;
};

Inside inside(const Window& w, int64_t width) {
  const int64_t begin = w.w0 < 0 ? ceil_div(-w.w0, w.col_step) : 0;
  const int64_t end = width > w.w0 ? ceil_div(width - w.w0, w.col_step) : 0;
  return {std::min(begin, w.cols),
          std::max(std::min(begin, w.cols), std::min(end, w.cols))};
}

int64_t row_of(const Window& w, int64_t i) { return w.h0 + i * w.row_step; }

bool row_inside(const Window& w, int64_t i, const Image& image) {
  return row_of(w, i) >= 0 && row_of(w, i) < image.height;
}

// Elements from the view's data to column j of row i of a channel.
int64_t index_of(const Image& m, int64_t channel, const Window& w, int64_t i,
                 int64_t j) {
  const int64_t* s = m.view.stride;
  return m.sample * s[0] + channel * s[1] + row_of(w, i) * s[2] +
         (w.w0 + j * w.col_step) * s[3];
}

template <class T>
void convert(const T* from, int64_t step, int64_t count, float* to) {
  if (step == 1)
    for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i * step]);
}

void convert_from(const View4& v, int64_t index, int64_t step, int64_t count,
                  float* to) {
  if (v.dtype == Dtype::float32)
    convert(static_cast<const float*>(v.data) + index, step, count, to);
  else if (v.dtype == Dtype::float16)
    convert(static_cast<const Float16*>(v.data) + index, step, count, to);
  else
    convert(static_cast<const BFloat16*>(v.data) + index, step, count, to);
}

const float* floats_at(const View4& v, int64_t index) {
  return static_cast<const float*>(v.data) + index;
}

// A column image, such as the positions of a linear layer, is a row image.
void lay_down(Image& image, Window& w) {
  if (image.width != 1 || w.cols != 1 || w.w0 != 0) return;
  std::swap(image.width, image.height);
  std::swap(image.view.stride[2], image.view.stride[3]);
  w = {0, w.h0, 1, w.rows, 1, w.row_step};
}

// A whole image without gaps is one long row.
void join_rows(Image& image, Window& w) {
  const int64_t* s = image.view.stride;
  const bool whole = w.w0 == 0 && w.cols == image.width && w.row_step == 1 &&
                     w.col_step == 1 && s[2] == image.width * s[3] && w.h0 >= 0 &&
                     w.h0 + w.rows <= image.height;
  if (!whole) return;
  w = {0, w.h0 * image.width, 1, w.size(), 1, 1};
  image.width *= image.height;
  image.height = 1;
}

void join(Image& image, Window& w) {
  lay_down(image, w);
  join_rows(image, w);
  if (image.height == 1) image.view.stride[2] = image.width * image.view.stride[3];
}

// One row of the image for each channel.
void row_of_planes(const Image& image, Channels from, const Window& w, int64_t i,
                   Inside in, const Microkernels& kernels, float* to,
                   int64_t to_stride) {
  const View4& v = image.view;
  const int64_t n = in.end - in.begin;
  const int64_t step = v.stride[3] * w.col_step;
  const int64_t channel_step = v.stride[1] * from.step;
  const int64_t first = index_of(image, from.first, w, i, in.begin);
  if (v.dtype == Dtype::float32 && channel_step == 1 && step != 1) {
    kernels.transpose(floats_at(v, first), step, n, from.count, to + in.begin,
                      to_stride);
    return;
  }
  for (int64_t c = 0; c < from.count; ++c)
    convert_from(v, first + c * channel_step, step, n, to + c * to_stride + in.begin);
}

// The planes of window `w`, already joined.
void planes(const Image& image, Channels from, const Window& w,
            const Microkernels& kernels, float* to, int64_t to_stride) {
  const Inside cols = inside(w, image.width);
  for (int64_t i = 0; i < w.rows; ++i, to += w.cols) {
    const bool any = row_inside(w, i, image) && cols.begin < cols.end;
    const Inside in = any ? cols : Inside{0, 0};
    for (int64_t c = 0; c < from.count; ++c) {
      float* row = to + c * to_stride;
      std::fill(row, row + in.begin, 0.f);
      std::fill(row + in.end, row + w.cols, 0.f);
    }
    if (any) row_of_planes(image, from, w, i, in, kernels, to, to_stride);
  }
}

// A part of a window: some of one row, or a few whole rows; at most kPackPositions.
Window part_of(const Window& w, int64_t row, int64_t col) {
  const int64_t rows = std::max<int64_t>(1, tuning::kPackPositions / w.cols);
  return {w.h0 + row * w.row_step,
          w.w0 + col * w.col_step,
          std::min(rows, w.rows - row),
          std::min(tuning::kPackPositions, w.cols - col),
          w.row_step,
          w.col_step};
}

// Any image: planes of a few positions are packed and then transposed. They stay in the
// first-level cache.
void lanes_through_planes(const Image& image, Channels from, int64_t width,
                          const Window& w, const Microkernels& kernels, float* to) {
  alignas(64) float chunk[tuning::kTileLanes * tuning::kPackPositions];
  for (int64_t row = 0; row < w.rows;) {
    Window part{};
    for (int64_t col = 0; col < w.cols; col += part.cols) {
      part = part_of(w, row, col);
      planes(image, from, part, kernels, chunk, tuning::kPackPositions);
      kernels.transpose(chunk, tuning::kPackPositions, from.count, part.size(),
                        to + (row * w.cols + col) * width, width);
    }
    row += part.rows;
  }
}

// Whether the image is float32 without gaps, and the window skips nothing.
bool dense(const Image& image, const Window& w) {
  const View4& v = image.view;
  return v.dtype == Dtype::float32 && v.stride[3] == 1 && v.stride[2] == image.width &&
         w.row_step == 1 && w.col_step == 1;
}

// Small dense images with padding: a few whole rows are transposed, then each is copied
// to its place.
void lanes_of_dense_rows(const Image& image, Channels from, int64_t width,
                         const Window& w, const Microkernels& kernels, float* to) {
  alignas(64) float chunk[tuning::kTileLanes * tuning::kPackPositions];
  const Inside in = inside(w, image.width);
  const int64_t begin = std::max<int64_t>(0, -w.h0);
  const int64_t end = std::min(w.rows, image.height - w.h0);
  const int64_t most = tuning::kPackPositions / image.width;
  if (from.count < width) std::fill_n(chunk, tuning::kPackPositions * width, 0.f);
  for (int64_t i = begin; i < end; i += most) {
    const int64_t rows = std::min(most, end - i);
    const int64_t at = image.sample * image.view.stride[0] +
                       from.first * image.view.stride[1] + row_of(w, i) * image.width;
    kernels.transpose(floats_at(image.view, at), image.view.stride[1] * from.step,
                      from.count, rows * image.width, chunk, width);
    for (int64_t r = 0; r < rows; ++r)
      std::copy_n(chunk + (r * image.width + w.w0 + in.begin) * width,
                  (in.end - in.begin) * width,
                  to + ((i + r) * w.cols + in.begin) * width);
  }
}

template <class T>
void copy_lanes(const T* from, int64_t step, int64_t positions, int64_t lanes,
                float* __restrict to, int64_t width) {
  for (int64_t j = 0; j < positions; ++j)
    for (int64_t lane = 0; lane < lanes; ++lane)
      to[j * width + lane] = to_float(from[j * step + lane]);
}

// Images whose lanes lie side by side, such as channels_last.
void lanes_side_by_side(const Image& image, Channels from, int64_t width,
                        const Window& w, float* to) {
  const View4& v = image.view;
  const Inside in = inside(w, image.width);
  const int64_t step = v.stride[3] * w.col_step, n = in.end - in.begin;
  for (int64_t i = 0; i < w.rows; ++i) {
    if (!row_inside(w, i, image)) continue;
    const int64_t at = index_of(image, from.first, w, i, in.begin);
    float* row = to + (i * w.cols + in.begin) * width;
    if (v.dtype == Dtype::float32)
      copy_lanes(floats_at(v, at), step, n, from.count, row, width);
    else if (v.dtype == Dtype::float16)
      copy_lanes(static_cast<const Float16*>(v.data) + at, step, n, from.count, row,
                 width);
    else
      copy_lanes(static_cast<const BFloat16*>(v.data) + at, step, n, from.count, row,
                 width);
  }
}

bool inside(const Window& w, const Image& image) {
  const Inside in = inside(w, image.width);
  return in.begin == 0 && in.end == w.cols && row_inside(w, 0, image) &&
         row_inside(w, w.rows - 1, image);
}

}  // namespace

void pack_planes(const Image& original, Channels from, Window window,
                 const Microkernels& kernels, float* to, int64_t to_stride) {
  Image image = original;
  join(image, window);
  planes(image, from, window, kernels, to, to_stride);
}

void pack_lanes(const Image& original, Channels from, int64_t width, Window window,
                const Microkernels& kernels, float* to) {
  Image image = original;
  join(image, window);
  const View4& v = image.view;
  const int64_t lane_step = v.stride[1] * from.step;
  const bool whole = inside(window, image);
  if (from.count < width || !whole) std::fill(to, to + window.size() * width, 0.f);
  if (lane_step == 1)
    lanes_side_by_side(image, from, width, window, to);
  else if (dense(image, window) && window.rows == 1 && whole)
    kernels.transpose(floats_at(v, index_of(image, from.first, window, 0, 0)),
                      lane_step, from.count, window.cols, to, width);
  else if (dense(image, window) && image.width <= tuning::kPackPositions)
    lanes_of_dense_rows(image, from, width, window, kernels, to);
  else
    lanes_through_planes(image, from, width, window, kernels, to);
}

}  // namespace fisherprune::cpu::grad_moments
