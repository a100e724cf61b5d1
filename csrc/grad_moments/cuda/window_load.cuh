// The way of images, and of the output gradient, to shared memory. A window holds, for
// each channel of a tile, the image rows that a unit of output positions sees, with a
// border of zeros; or an image of 2 x 2, with zeros behind it.
#pragma once

#include "grad_moments/cuda/kernel.cuh"

namespace fisherprune::cuda::grad_moments {

constexpr int WINDOW = 32;           // positions of a stage
constexpr int WORD = sizeof(float);  // bytes
constexpr int SMALL = 4;             // positions of 2 x 2, of images of 2 x 2

// The smallest number, not below `least`, that leaves `rest` when divided by `modulus`.
__host__ __device__ constexpr int64_t at_least(int64_t least, int64_t rest,
                                               int64_t modulus) {
  return least + ((rest - least) % modulus + modulus) % modulus;
}

// The distance from row to row of a window with which the rows of a filter's taps lie
// in different banks. For every second position it differs from that for neighbours.
__host__ __device__ constexpr int64_t window_pitch(int64_t least, int64_t stride) {
  return stride == 2 ? at_least(least, 12, 32) : at_least(least, 8, 16);
}

// The same, for a filter that keeps the image's size, or halves it.
__host__ __device__ constexpr int usual_pitch(int across, int stride) {
  return static_cast<int>(window_pitch(4 + across * stride, stride));
}

// Where a unit's image rows lie in shared memory, in words.
struct Window {
  int unit;         // positions of a stage that are of one sample: 4, 16 or 32
  int units;        // of a stage
  int column_bits;  // of which 2^column_bits lie side by side
  int rows;         // of the image, that are copied for a unit
  int first_row;    // of them, counted from where the first tap sees the unit
  int left;         // border before a row; the border behind it is the next row's
  int pitch;        // from row to row, see the banks below
  int channel;      // from channel to channel, as if its rows went on
  int channels;     // that a tile's weights may belong to
  int pieces;       // of four values
  int bytes;        // of all channels
};

struct WindowTask {
  GradMomentsTask moments;
  Window window;
  // Distances in bytes: between the rows that a thread copies of the gradient, between
  // the samples of two stages, and in a window between the rows of two output rows.
  int64_t grad_step, next_grad, next_input;
  int row_step;
};

// Four values of a channel's row, on their way to a window.
struct alignas(16) Piece {
  int64_t offset;  // in bytes, from the first unit's image and its window's top row
  int row;         // of the window
  int to;          // byte of the stage's windows
};

__device__ inline Piece read_piece(SharedAddress from) {
  uint32_t words[4];
  load_shared(words, from);
  return {static_cast<int64_t>(uint64_t{words[1]} << 32 | words[0]),
          static_cast<int>(words[2]), static_cast<int>(words[3])};
}

// A block's shared memory. The windows of a stage lie one after the other.
template <class Tile>
struct WindowMemory {
  Piece* pieces;
  float* grad;
  float* windows;

  __device__ explicit WindowMemory(const Window& window)
      : pieces(reinterpret_cast<Piece*>(dynamic_shared())),
        grad(reinterpret_cast<float*>(pieces + window.units * window.pieces)),
        windows(grad + Tile::stages * Tile::rows * WINDOW) {}
};

template <class Tile>
size_t window_memory_bytes(const Window& window) {
  const size_t units = window.units;
  return units * window.pieces * sizeof(Piece) +
         Tile::stages * (Tile::rows * WINDOW * sizeof(float) + units * window.bytes);
}

// Bytes of a value in memory; in shared memory all values are float32.
template <Dtype dtype>
__host__ __device__ constexpr int value_bytes() {
  return dtype == Dtype::float32 ? WORD : 2;
}

// Lists the pieces of a stage, and clears all windows: no copy writes to their borders.
template <class Tile, Dtype dtype>
__device__ inline void prepare_windows(const WindowTask& task,
                                       const WindowMemory<Tile>& memory,
                                       const TilePlace& tile) {
  const GradMomentsTask& m = task.moments;
  const Window& w = task.window;
  const int across = (m.input.width + 3) / 4, taps = m.kernel_h * m.kernel_w;
  const int first = tile.column / taps, channels = m.columns / taps;
  const int64_t from = static_cast<int64_t>(tile.conv_group) * channels + first;
  for (int i = threadIdx.x; i < w.units * w.pieces; i += Tile::threads) {
    const int column = i % across * 4, line = i / across % w.rows;
    const int row = w.first_row + line;
    const int channel = i / across / w.rows % w.channels;
    const int unit = i / across / w.rows / w.channels;
    memory.pieces[i] = {
        unit * m.input.sample_stride + (from + channel) * m.input_channel +
            row * m.input.stride_h + column * value_bytes<dtype>(),
        first + channel < channels ? row : OUTSIDE,
        unit * w.bytes +
            (channel * w.channel + line * w.pitch + w.left + column) * WORD};
  }
  for (int i = threadIdx.x; i < Tile::stages * w.units * (w.bytes / WORD);
       i += Tile::threads)
    memory.windows[i] = 0.f;
}

// The word of quad `quad` of row `row` in a stage of the output gradient: 8 rows that
// are read together have their quads in different banks.
__device__ inline int grad_place(int row, int quad) {
  return row * WINDOW + ((quad ^ row) & 7) * 4;
}

// A unit's first image row; above the image where it is negative.
__device__ inline int top_row(const GradMomentsTask& task, int at) {
  return task.width_divider(at) * task.input.step_h - task.input.pad_h;
}

// Where a unit starts in its rows; shorter rows are all in one unit.
template <int bits>
__device__ inline int first_column(const GradMomentsTask& task, int at) {
  if constexpr (1 << bits < WINDOW) return 0;
  return (at - task.width_divider(at) * task.out_width) * task.input.step_w;
}

// Starts the copy of four values, or of zeros, to where they will lie as float32.
template <Dtype dtype>
__device__ inline void copy_four(SharedAddress to, const char* from, bool exists) {
  // Without a byte to read the address need not exist.
  if constexpr (dtype == Dtype::float32)
    copy16_async(to, from, exists ? 16 : 0);
  else
    copy8_async(to, from, exists);
}

// Widens four values of 16 bits, once they have landed.
template <Dtype dtype>
__device__ inline void widen_four(SharedAddress at) {
  uint32_t pairs[2], words[4];
  load_shared(pairs, at);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    words[i] = __float_as_uint(to_float<dtype>(pairs[i / 2] >> i % 2 * 16 & 0xffffu));
  store_shared(at, words);
}

// What a thread copies: one quad of positions in some rows of the output gradient, and
// some pieces of the images. Its pointers move from sample to sample: to compute them
// from the cursor would take more instructions than the copies.
template <class Tile, Dtype dtype>
struct Copies {
  static constexpr int quads = WINDOW / 4, step = Tile::threads / quads;
  static_assert(step % 8 == 0 && Tile::rows % step == 0);
  Cursor next;        // of the stage that comes next
  const char* grad;   // the quad in the first row, where the position is 0
  const char* image;  // of the first unit
  int rows;           // that exist, from the first on
  int to;             // the quad's byte in a stage
  int limit;          // the position or sample where there is no quad any more

  __device__ Copies(const WindowTask& task, const TilePlace& tile,
                    const SampleRange& range)
      : next{range.first, 0} {
    const GradMomentsTask& m = task.moments;
    const int first = tile.row + static_cast<int>(threadIdx.x) / quads;
    const int64_t row = static_cast<int64_t>(tile.conv_group) * m.rows + first;
    const int quad = static_cast<int>(threadIdx.x) % quads, t = quad * 4;
    const int unit = t / task.window.unit, at = t - unit * task.window.unit;
    grad = m.grad.data + row * m.grad_channel +
           (range.first + unit) * m.grad.sample_stride + at * value_bytes<dtype>();
    image = m.input.data + range.first * m.input.sample_stride;
    rows = kept(m.rows - first);
    to = kept(grad_place(threadIdx.x / quads, quad) * WORD);
    const int samples = at < m.positions ? range.end - unit : range.first;
    limit = kept(task.window.units == 1 ? m.positions - at : samples);
  }

  // Whether there is a quad: decided by position, or by sample where units are samples.
  __device__ bool exists(const WindowTask& task) const {
    return (task.window.units == 1 ? next.at : next.sample) < limit;
  }

  __device__ void start_grad(const WindowTask& task, SharedAddress stage) const {
    const bool found = exists(task);
    const char* from = grad + next.at * int64_t{value_bytes<dtype>()};
#pragma unroll
    for (int i = 0; i < Tile::rows; i += step) {
      copy_four<dtype>(stage + to + i * WINDOW * WORD, from, found && i < rows);
      from += task.grad_step;
    }
  }

  __device__ void start_windows(const WindowTask& task, SharedAddress pieces,
                                SharedAddress stage, int last) const {
    const Operand& input = task.moments.input;
    const int top = top_row(task.moments, next.at);
    const char* from = image + top * static_cast<int64_t>(input.stride_h);
    const int left = last - next.sample, units = task.window.units;
    const int count = (left < units ? left : units) * task.window.pieces;
#pragma unroll 1  // there is mostly one
    for (int i = threadIdx.x; i < count; i += Tile::threads) {
      const Piece piece = read_piece(pieces + i * static_cast<int>(sizeof(Piece)));
      const bool inside =
          static_cast<unsigned>(top + piece.row) < static_cast<unsigned>(input.height);
      copy_four<dtype>(stage + piece.to, from + piece.offset, inside);
    }
  }

  // Widens what this thread has copied, where it lies.
  __device__ void widen(const WindowTask& task, SharedAddress pieces,
                        SharedAddress grad_stage, SharedAddress windows) const {
#pragma unroll
    for (int i = 0; i < Tile::rows; i += step)
      widen_four<dtype>(grad_stage + to + i * WINDOW * WORD);
    const int count = task.window.units * task.window.pieces;
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += Tile::threads)
      widen_four<dtype>(windows +
                        read_piece(pieces + i * static_cast<int>(sizeof(Piece))).to);
  }

  __device__ void advance(const WindowTask& task) {
    next.at += task.window.unit;
    if (next.at < task.moments.positions) return;
    next = {next.sample + task.window.units, 0};
    grad += task.next_grad;
    image += task.next_input;
  }
};

}  // namespace fisherprune::cuda::grad_moments
