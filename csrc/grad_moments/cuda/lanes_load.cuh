// How images and the output gradient lie in the shared memory of lanes.cuh, and the way
// there. Image rows lie in bands: those that some output rows of one sample see, for
// some stages. A band's first stage brings them all. Copies are of 16 bytes where rows
// allow it, else of 4; each value is copied once for all taps.
#pragma once

#include "grad_moments/cuda/taps_load.cuh"

namespace fisherprune::cuda::grad_moments {

// Distances in shared memory, in bytes. What a warp reads at once belongs to eight
// channels and to the positions of four words; or in pixels of 16 bits, which it reads
// in 16 bytes, to eight positions. In planes the channels are an odd number of quads of
// banks apart, in pixels the positions are 8, 24 or 12 banks apart; and a row's first
// position is as far behind the last one of the row before, up to a multiple of 16
// bytes of positions. So nothing shares a bank; but where every second position is read
// of planes, or of pixels of 16 bits, a read of an image takes twice the time.
template <class Tile, Layout layout_, int stride_, Dtype dtype_>
struct LanesShape {
  static constexpr Layout layout = layout_;
  static constexpr int stride = stride_;  // of the convolution
  static constexpr Dtype dtype = dtype_;
  static constexpr bool planes = layout == Layout::planes;
  static constexpr int value = value_bytes<dtype>();
  static constexpr int vector = QUAD_BYTES / value;  // values of a copy of 16 bytes
  static constexpr int stage = STAGE_BYTES / value;  // positions of a stage
  static constexpr int depth = 2 * vector;           // positions of a product
  static constexpr int channels = Tile::columns / TAPS;
  static_assert(channels % 8 == 0 && Tile::threads % channels == 0);
  static_assert(!planes || stride == 1 || value == WORD,
                "a word of two neighbours has no two positions");
  // Columns of the border before a row of an image; the border behind it is the next
  // row's.
  static constexpr int left = planes ? vector : 1;
  static constexpr int column =  // from column to column
      planes ? value
             : static_cast<int>(at_least(channels * value,
                                         stride == 2 || value < WORD ? 16 : 32,
                                         value < WORD ? 32 : 64));
  // From position to position of the gradient in pixels; in planes its rows lie as in
  // the other kernels.
  static constexpr int grad_pitch = (Tile::rows + 8) * value;
  static constexpr int grad_stage =
      planes ? Tile::rows * STAGE_BYTES : stage * grad_pitch;
  static constexpr int grad_at = Tile::threads / 32 * RowsOfTaps<Tile>::floats * WORD;
  static_assert(grad_at % STAGE_BYTES == 0, "see flipped");
  static constexpr int slots_at = grad_at + Tile::stages * grad_stage;

  static int64_t row(int64_t width, int64_t out_width) {
    // In planes a row begins where copies of 16 bytes may.
    return at_least(width + left, planes ? width : out_width, vector) * column;
  }
  // From channel to channel, of `rows` bytes.
  static int64_t channel(int64_t rows) {
    return planes ? at_least(rows + left * column, 16, 32) : value;
  }
  // A band of all channels.
  static int64_t slot(int64_t rows) {
    return planes ? channels * channel(rows) : rows + left * column;
  }
};

// Positions from `first` up to `end`.
struct Band {
  int first, end;
};

struct LanesTask {
  GradMomentsTask moments;
  int64_t grad_position;  // bytes from position to position of the gradient
  Divider band_divider, piece_divider;
  int band;      // positions of a band: whole output rows
  int rows;      // of the image, that a band sees
  int pieces;    // of an image row: copies of a channel, or of a few channels
  int row;       // bytes from row to row
  int row_jump;  // bytes by which a position is further on for each output row before
  int channel;   // bytes from channel to channel
  int slot;      // bytes of a band
  int slots;
  bool grad_vectors, image_vectors;  // in planes: copied 16 bytes at a time

  // The band of a position.
  __device__ Band band_at(int at) const {
    const int first = band_divider(at) * band, end = first + band;
    return {first, end < moments.positions ? end : moments.positions};
  }
};

template <class Shape>
size_t lanes_memory_bytes(const LanesTask& task) {
  return Shape::slots_at + static_cast<size_t>(task.slots) * task.slot;
}

// What a block copies next. The places of a thread's copies are computed anew for each
// stage, because products take nearly all registers.
template <class Tile, class Shape>
struct LanesCopies {
  int samples;           // that are left
  int at;                // the position of the stage that comes next
  Slot slot;             // of its band
  uint32_t grad, image;  // where the tile's first channels of its sample lie, in bytes
  int rows, channels;    // of the tile, that exist

  __device__ LanesCopies(const GradMomentsTask& m, const TilePlace& tile,
                         const SampleRange& range)
      : samples(range.end - range.first), at(0), slot{0} {
    const int64_t of_group = m.columns / TAPS, first = tile.column / TAPS;
    grad = static_cast<uint32_t>(
        (static_cast<int64_t>(tile.conv_group) * m.rows + tile.row) * m.grad_channel +
        range.first * m.grad.sample_stride);
    image =
        static_cast<uint32_t>((tile.conv_group * of_group + first) * m.input_channel +
                              range.first * m.input.sample_stride);
    rows = m.rows - tile.row;
    channels = static_cast<int>(of_group - first);
  }

  // Copies the stage's positions of each channel.
  template <int bytes>
  __device__ void start_grad_planes(const GradMomentsTask& m, SharedAddress stage,
                                    int end) const {
    constexpr int pieces = STAGE_BYTES / bytes, step = Tile::threads / pieces;
    static_assert(Tile::rows % step == 0);
    const int thread = thread_index(), first = thread / pieces;
    const int place = thread % pieces * bytes;  // in a row of the stage
    const char* from =
        m.grad.data + (grad + static_cast<uint32_t>(first * m.grad_channel) +
                       static_cast<uint32_t>(at * Shape::value + place));
    const int64_t further = step * m.grad_channel;
#pragma unroll
    for (int i = 0; i < Tile::rows; i += step) {
      const int row = first + i;  // its quads' order depends on it
      const SharedAddress to = stage + grad_place(row, place / QUAD_BYTES) * WORD;
      if (row < rows)
        copy_piece<bytes>(to + place % QUAD_BYTES, from,
                          (end - at) * Shape::value - place);
      from += further;
    }
  }

  // Copies the channels of each of the stage's positions.
  __device__ void start_grad_pixels(const LanesTask& task, SharedAddress stage,
                                    int end) const {
    constexpr int pieces = Tile::rows / Shape::vector;
    constexpr int step = Tile::threads / pieces;
    static_assert(Tile::threads % pieces == 0 && Shape::stage % step == 0);
    const int thread = thread_index(), first = thread / pieces;
    const int piece = thread % pieces;
    const SharedAddress to = stage + first * Shape::grad_pitch + piece * QUAD_BYTES;
    const char* from = task.moments.grad.data +
                       (grad + static_cast<uint32_t>(piece * QUAD_BYTES) +
                        static_cast<uint32_t>((at + first) * task.grad_position));
    const int64_t further = step * task.grad_position;
    const bool exists = piece * Shape::vector < rows;
#pragma unroll
    for (int i = 0; i < Shape::stage; i += step) {
      const bool found = exists && at + first + i < end;
      copy_piece<QUAD_BYTES>(to + i * Shape::grad_pitch, from, found ? QUAD_BYTES : 0);
      from += further;
    }
  }

  // Copies the image rows of the band that begins here.
  template <int bytes>
  __device__ void start_image(const LanesTask& task, SharedAddress to) const {
    const GradMomentsTask& m = task.moments;
    // In planes neighbouring threads have the pieces of a channel's rows, in pixels the
    // channels of a position.
    constexpr bool planes = Shape::planes;
    constexpr int units = Shape::channels / (planes ? 1 : Shape::vector);
    constexpr int threads = Tile::threads / units;  // of a unit
    const int thread = thread_index();
    const int unit = planes ? thread / threads : thread % units;
    // Nothing is copied to channels that do not exist, and so they are zero.
    if (unit * (planes ? 1 : Shape::vector) >= channels) return;
    to += Shape::left * Shape::column + unit * (planes ? task.channel : QUAD_BYTES);
    const int64_t piece = planes ? bytes : m.input.stride_w;
    const int64_t offset = unit * (planes ? m.input_channel : QUAD_BYTES);
    const int top = top_row(m, at);
    const char* from = m.input.data + image + offset + top * m.input.stride_h;
#pragma unroll 1
    for (int i = planes ? thread % threads : thread / units;
         i < task.rows * task.pieces; i += threads) {
      const int line = task.piece_divider(i), nth = i - line * task.pieces;
      const bool inside =
          static_cast<unsigned>(top + line) < static_cast<unsigned>(m.input.height);
      copy_piece<bytes>(to + line * task.row + nth * (planes ? bytes : Shape::column),
                        from + line * m.input.stride_h + nth * piece,
                        inside ? bytes : 0);
    }
  }

  // Starts the copies of a stage that ends with its band at the latest, and goes on.
  __device__ void start(const LanesTask& task, SharedAddress stage,
                        SharedAddress slots) {
    const GradMomentsTask& m = task.moments;
    const Band band = task.band_at(at);
    if constexpr (!Shape::planes)
      start_grad_pixels(task, stage, band.end);
    else if (task.grad_vectors)
      start_grad_planes<QUAD_BYTES>(m, stage, band.end);
    else
      start_grad_planes<WORD>(m, stage, band.end);
    if (at == band.first) {
      if (!Shape::planes || task.image_vectors)
        start_image<QUAD_BYTES>(task, slots + slot.at);
      else
        start_image<WORD>(task, slots + slot.at);
    }
    at += Shape::stage;
    if (at < band.end) return;
    slot.move_on(task);
    at = band.end;
    if (at < m.positions) return;
    at = 0;
    --samples;
    grad += static_cast<uint32_t>(m.grad.sample_stride);
    image += static_cast<uint32_t>(m.input.sample_stride);
  }
};

}  // namespace fisherprune::cuda::grad_moments
