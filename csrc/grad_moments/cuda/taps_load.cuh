// How images and the output gradient lie in the shared memory of taps.cuh, and the way
// there. Image rows lie in bands, each for some stages of one sample: a band's first
// stage brings all rows that it sees, the next ones bring their new rows. Each thread
// copies one place in some rows of some channel: nothing is listed in memory.
#pragma once

#include "grad_moments/cuda/window_load.cuh"

namespace fisherprune::cuda::grad_moments {

constexpr int STAGE_BYTES = 128;  // of an output channel's positions
constexpr int QUAD_BYTES = 16, QUADS = STAGE_BYTES / QUAD_BYTES;

// What lies side by side in memory, and so in shared memory.
enum class Layout {
  planes,  // the positions of a channel
  pixels   // the channels of a position: channels_last
};

// Starts a copy of 16 bytes, or of 4: of `size` bytes at the most, and of zeros.
template <int bytes>
__device__ inline void copy_piece(SharedAddress to, const char* from, int size) {
  // Without a byte to read the address need not exist.
  if constexpr (bytes == QUAD_BYTES)
    copy16_async(to, from, size < 0 ? 0 : size < bytes ? size : bytes);
  else
    copy4_async(to, from, size > 0);
}

// How images 2^bits wide lie in shared memory; distances in bytes.
template <int bits_, Dtype dtype_>
struct Image {
  static constexpr int bits = bits_;
  static constexpr Dtype dtype = dtype_;
  static constexpr int value = value_bytes<dtype>(), width = 1 << bits;
  static constexpr int row = width * value;
  static constexpr int piece = row < QUAD_BYTES ? row : QUAD_BYTES;  // of a copy
  static constexpr int pieces = row / piece;
  // Whether four lanes' words lie in two rows, instead of side by side.
  static constexpr bool is_narrow = row < QUAD_BYTES;
  static constexpr int pitch = is_narrow ? 24 : piece + row;  // a border lies before
  static constexpr int units = bits == 2 ? STAGE_BYTES / value / 16 : 1;  // of a stage
  static constexpr int unit = STAGE_BYTES / value / units;  // positions of a sample
  static constexpr int rows = unit >> bits;                 // of a unit
  static constexpr int seen = rows + 2;                     // image rows of a unit

  // The place of a position in the rows of a tap.
  __host__ __device__ static constexpr int place(int t) {
    return (t >> bits) * pitch + (t & (width - 1)) * value;
  }
  // The distance of the channels, with `lines` rows each. Eight channels' words at four
  // neighbouring positions lie in different banks.
  __host__ __device__ static constexpr int channel(int lines) {
    return static_cast<int>(at_least(lines * pitch + piece, is_narrow ? 48 : 16, 128));
  }
};

struct TapsTask {
  GradMomentsTask moments;
  int64_t grad_step;  // as in WindowTask
  uint32_t next_grad, next_input;
  int band;     // positions of a band: a power of two
  int channel;  // bytes from channel to channel
  int slot;     // bytes of a band of all channels, or of a stage's samples
  int slots;
  bool whole;  // bands are whole images: what lies outside of them is never written

  // How far a position lies behind its band's first one.
  __device__ int in_band(int at) const { return at & (band - 1); }
};

// A block's shared memory: for each warp a place to sort what it flushes, the stages of
// the gradient, the slots of the bands.
template <class Tile>
struct TapsMemory {
  static constexpr int grad_at = Tile::threads / 32 * RowsOfTaps<Tile>::floats * WORD;
  static_assert(grad_at % STAGE_BYTES == 0, "see flipped");
  static constexpr int grad_stage = Tile::rows * STAGE_BYTES;
  static constexpr int slots_at = grad_at + Tile::stages * grad_stage;
};

template <class Tile>
size_t taps_memory_bytes(const TapsTask& task) {
  return TapsMemory<Tile>::slots_at + static_cast<size_t>(task.slots) * task.slot;
}

// A band's slot; the slots are used in turn.
struct Slot {
  int at;  // bytes, from the first one on

  template <class Task>
  __device__ void move_on(const Task& task) {
    at += task.slot;
    if (at == task.slots * task.slot) at = 0;
  }
};

// A lane's row of the gradient's matrices, in bytes of a stage: as in Lane.
template <class Tile>
__device__ inline int taps_grad_place() {
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32;
  const int row = warp / Tile::warps_n * (Tile::products_m * 16);
  return grad_place(row + lane % 16, lane / 16) * WORD;
}

// Where a thread's copies go: computed anew for each stage, because products take
// nearly all registers.
template <class Tile, int bits, Dtype dtype>
struct TapsPlaces {
  using Image = grad_moments::Image<bits, dtype>;
  static constexpr int channels = Tile::columns / TAPS;
  static constexpr int step = Tile::threads / QUADS;  // rows of the gradient
  static constexpr int lines = Tile::threads / (channels * Image::pieces);  // at once
  static_assert(step % 8 == 0 && Tile::rows % step == 0);
  static_assert(Tile::threads % (channels * Image::pieces) == 0);
  static_assert(channels % 8 == 0 && channels % Image::pieces == 0);
  int thread = thread_index();

  __device__ int row() const { return thread / QUADS; }
  __device__ int quad() const { return thread % QUADS; }
  __device__ int quad_position() const { return quad() * (QUAD_BYTES / Image::value); }
  // In bytes of a stage.
  __device__ int quad_place() const { return grad_place(row(), quad()) * WORD; }

  __device__ int line() const { return thread / (channels * Image::pieces); }
  __device__ int piece() const { return thread % Image::pieces * Image::piece; }
  // Neighbouring threads have the pieces of a row, then channels whose rows lie in
  // other banks.
  __device__ int channel() const {
    const int nth = thread / Image::pieces % channels * Image::pieces;
    return nth % channels + nth / channels;
  }
  // In bytes of a slot.
  __device__ int piece_place(const TapsTask& task) const {
    return channel() * task.channel + Image::piece + piece();
  }
};

// What a thread copies: one quad of positions in some rows of the output gradient, and
// one piece of some rows of a channel's image.
template <class Tile, int bits, Dtype dtype>
struct TapsCopies {
  using Image = grad_moments::Image<bits, dtype>;
  using Places = TapsPlaces<Tile, bits, dtype>;
  int at;          // the position of the stage that comes next
  Slot slot;       // of its band
  uint32_t grad;   // where its sample's first quad lies, in bytes of the data
  uint32_t image;  // and the piece of the image's first row

  __device__ TapsCopies(const TapsTask& task, const TilePlace& tile,
                        const SampleRange& range)
      : at(0), slot{0} {
    const GradMomentsTask& m = task.moments;
    const Places places;
    const int first = tile.row + places.row(), t = places.quad_position();
    const int64_t row = static_cast<int64_t>(tile.conv_group) * m.rows + first;
    const int64_t channel = static_cast<int64_t>(tile.conv_group) * (m.columns / TAPS) +
                            tile.column / TAPS + places.channel();
    grad = static_cast<uint32_t>(
        row * m.grad_channel + (range.first + t / Image::unit) * m.grad.sample_stride +
        t % Image::unit * Image::value);
    image = static_cast<uint32_t>(range.first * m.input.sample_stride + places.piece() +
                                  channel * m.input_channel);
  }

  __device__ static void copy_piece(SharedAddress to, const char* from, bool exists) {
    if constexpr (Image::piece == QUAD_BYTES)
      copy16_async(to, from, exists ? QUAD_BYTES : 0);
    else
      copy8_async(to, from, exists);
  }

  // `left`: samples, where they are units.
  __device__ void start_grad(const TapsTask& task, SharedAddress stage,
                             int left) const {
    const Places places;
    const bool found = Image::units == 1 || places.quad_position() / Image::unit < left;
    const SharedAddress to = stage + places.quad_place();
    const char* from = task.moments.grad.data + (grad + at * Image::value);
#pragma unroll
    for (int i = 0; i < Tile::rows; i += Places::step) {
      // Without a byte to read the address need not exist.
      copy16_async(to + i * STAGE_BYTES, from, found ? QUAD_BYTES : 0);
      from += task.grad_step;
    }
  }

  // The rows of one sample that this stage sees first.
  __device__ void start_rows(const TapsTask& task, SharedAddress slots) const {
    const Places places;
    const int behind = task.in_band(at), top = (at >> bits) - 1;
    const SharedAddress to =
        slots + slot.at + places.piece_place(task) + (behind >> bits) * Image::pitch;
    const char* from = task.moments.input.data + (image + at * Image::value);
#pragma unroll 1  // there is mostly one
    for (int i = places.line() + (behind ? Image::seen - Image::rows : 0);
         i < Image::seen; i += Places::lines) {
      const bool inside = static_cast<unsigned>(top + i) <
                          static_cast<unsigned>(task.moments.input.height);
      if (inside || !task.whole)
        copy_piece(to + i * Image::pitch, from + (i - 1) * Image::row, inside);
    }
  }

  // The images of all samples of a stage.
  __device__ void start_images(const TapsTask& task, SharedAddress slot_of_stage,
                               int left) const {
    const Places places;
    const SharedAddress to = slot_of_stage + places.piece_place(task) + Image::pitch;
    const char* from = task.moments.input.data + image;
#pragma unroll
    for (int i = 0; i < Image::units * Image::rows; i += Places::lines) {
      const int line = i + places.line();
      const int unit = line / Image::rows, row = line % Image::rows;
      if (unit < Image::units && unit < left)
        copy_piece(to + unit * Places::channels * task.channel + row * Image::pitch,
                   from + unit * task.moments.input.sample_stride + row * Image::row,
                   true);
    }
  }

  __device__ void advance(const TapsTask& task) {
    at += Image::unit;
    if (Image::units > 1 || at == task.moments.positions) {
      at = 0;
      grad += task.next_grad;
      image += task.next_input;
    }
    if (Image::units == 1 && task.in_band(at) == 0) slot.move_on(task);
  }
};

}  // namespace fisherprune::cuda::grad_moments
