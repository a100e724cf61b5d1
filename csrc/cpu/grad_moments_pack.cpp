#include "grad_moments_pack.h"

#include <algorithm>

#include "half_float.h"

namespace fisherprune {
namespace {

constexpr int64_t kChunk = 64;  // columns converted at a time
constexpr int64_t kMaxLanes = 64;

// The columns of a window that lie inside the image: [begin, end).
struct Inside {
  int64_t begin, end;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Inside inside(const Window& w, int64_t width) {
  const int64_t begin = w.w0 < 0 ? ceil_div(-w.w0, w.col_step) : 0;
  const int64_t end = width > w.w0 ? ceil_div(width - w.w0, w.col_step) : 0;
  return {std::min(begin, w.cols), std::max(std::min(begin, w.cols),
                                            std::min(end, w.cols))};
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

// A column image, such as the positions of a linear layer, is a row image.
void lay_down(Image& image, Window& w) {
  if (image.width != 1 || w.cols != 1 || w.w0 != 0) return;
  std::swap(image.width, image.height);
  std::swap(image.view.stride[2], image.view.stride[3]);
  w = {0, w.h0, 1, w.rows, 1, w.row_step};
}

bool channels_last(const View4& v) {
  return v.dtype == Dtype::float32 && v.stride[1] == 1;
}

void row_of_planes(const Image& image, int64_t channel, int64_t count, const Window& w,
                   int64_t i, Inside in, const Microkernels& kernels, float* to,
                   int64_t to_stride) {
  const int64_t n = in.end - in.begin;
  const int64_t step = image.view.stride[3] * w.col_step;
  const int64_t first = index_of(image, channel, w, i, in.begin);
  if (channels_last(image.view) && step != 1) {
    kernels.transpose(floats_at(image.view, first), step, n, count, to + in.begin,
                      to_stride);
    return;
  }
  for (int64_t c = 0; c < count; ++c)
    convert_from(image.view, first + c * image.view.stride[1], step, n,
                 to + c * to_stride + in.begin);
}

void row_of_lanes(const Image& image, int64_t channel, int64_t channel_step,
                  int64_t lanes, int64_t width, const Window& w, int64_t i, Inside in,
                  const Microkernels& kernels, float* to) {
  const View4& v = image.view;
  const int64_t step = v.stride[3] * w.col_step;
  const int64_t lane_step = v.stride[1] * channel_step;
  const int64_t first = index_of(image, channel, w, i, in.begin);
  to += in.begin * width;
  if (lane_step == 1) {
    for (int64_t j = 0; j < in.end - in.begin; ++j)
      convert_from(v, first + j * step, 1, lanes, to + j * width);
    return;
  }
  if (v.dtype == Dtype::float32 && step == 1) {
    kernels.transpose(floats_at(v, first), lane_step, lanes, in.end - in.begin, to,
                      width);
    return;
  }
  float rows[kMaxLanes * kChunk];
  for (int64_t j = 0; j < in.end - in.begin; j += kChunk) {
    const int64_t n = std::min(kChunk, in.end - in.begin - j);
    for (int64_t lane = 0; lane < lanes; ++lane)
      convert_from(v, first + lane * lane_step + j * step, step, n,
                   rows + lane * kChunk);
    kernels.transpose(rows, kChunk, lanes, n, to + j * width, width);
  }
}

}  // namespace

void pack_planes(const Image& original, int64_t channel, int64_t count, Window window,
                 const Microkernels& kernels, float* to, int64_t to_stride) {
  Image image = original;
  lay_down(image, window);
  join_rows(image, window);
  const Inside in = inside(window, image.width);
  for (int64_t i = 0; i < window.rows; ++i, to += window.cols) {
    const bool any = row_inside(window, i, image) && in.begin < in.end;
    const Inside filled = any ? in : Inside{0, 0};
    for (int64_t c = 0; c < count; ++c) {
      float* row = to + c * to_stride;
      std::fill(row, row + filled.begin, 0.f);
      std::fill(row + filled.end, row + window.cols, 0.f);
    }
    if (any)
      row_of_planes(image, channel, count, window, i, in, kernels, to, to_stride);
  }
}

void pack_lanes(const Image& original, int64_t channel, int64_t channel_step,
                int64_t lanes, int64_t width, Window window,
                const Microkernels& kernels, float* to) {
  Image image = original;
  lay_down(image, window);
  join_rows(image, window);
  const Inside in = inside(window, image.width);
  for (int64_t i = 0; i < window.rows; ++i, to += window.cols * width) {
    const bool any = row_inside(window, i, image) && in.begin < in.end;
    const bool whole = any && lanes == width && in.begin == 0 && in.end == window.cols;
    if (!whole) std::fill(to, to + window.cols * width, 0.f);
    if (any)
      row_of_lanes(image, channel, channel_step, lanes, width, window, i, in, kernels,
                   to);
  }
}

}  // namespace fisherprune
