// grad_moments for 3 x 3 convolutions that keep the image's size, on images of 4, 8, 16
// or 32 columns: most layers of residual networks. A tile has all nine taps of 16
// channels. The columns of a product are eight channels, and each of a warp's nine
// products in a row has one tap: so the place of a tap in shared memory is the same for
// all lanes, and known to the compiler.
//
// A stage of the pipeline holds 128 bytes of positions of each output channel, or of
// two or four samples of 4 x 4. Image rows lie in bands, each for some stages of one
// sample: a band's first stage brings all rows that it sees, the next ones bring their
// new rows. Products of 16-bit values are exact; float32 is rounded to TF32 in
// registers. Each thread copies one place in some rows of some channel: nothing is
// listed in memory.
//
// Everything else, the order of the additions too, is as in the other kernels.
#pragma once

#include "grad_moments/cuda/window_load.cuh"

namespace fisherprune::cuda::grad_moments {

constexpr int STAGE_BYTES = 128;  // of an output channel's positions
constexpr int QUAD_BYTES = 16, QUADS = STAGE_BYTES / QUAD_BYTES;

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

  __device__ void move_on(const TapsTask& task) {
    at += task.slot;
    if (at == task.slots * task.slot) at = 0;
  }
};

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

// Reads the three taps of a row, for a half of a product's positions. `from`: the
// middle tap's value at the lane's position.
template <Dtype dtype>
__device__ inline void read_taps(uint32_t (&taps)[3], SharedAddress from) {
#pragma unroll
  for (int x = 0; x < 3; ++x)
    taps[x] = __float_as_uint(load_shared(from + (x - 1) * WORD));
  if constexpr (dtype == Dtype::float32) {
    round_operand<dtype>(taps);
  } else {  // two neighbouring positions, from odd ones too
    taps[0] = taps[0] >> 16 | taps[1] << 16;
    taps[2] = taps[1] >> 16 | taps[2] << 16;
  }
}

// Multiplies 32 bytes of positions; `grad` and `window` are the lane's places of the
// first ones. Where a half is a row, the second half's row is the first half's next
// one.
template <class Tile, int bits, Dtype dtype, bool first>
__device__ inline void multiply_taps(Moments<Tile>& moments, SharedAddress grad,
                                     SharedAddress window) {
  using Image = grad_moments::Image<bits, dtype>;
  uint32_t a[Tile::products_m][4];
#pragma unroll
  for (int i = 0; i < Tile::products_m; ++i) {
    read_matrices(a[i], grad + i * 16 * STAGE_BYTES);
    round_operand<dtype>(a[i]);
  }
  constexpr bool of_samples = Image::units > 1;
  constexpr bool shares = Image::row == QUAD_BYTES && !of_samples;
  uint32_t halves[2][3];
#pragma unroll
  for (int y = 0; y < 3; ++y) {
    const SharedAddress row = window + y * Image::pitch;
    // Or the compiler would read all rows first, for which registers are missing.
    if (of_samples && y > 0) __syncwarp();
    if (y == 0 || !shares)
      read_taps<dtype>(halves[0], row);
    else
#pragma unroll
      for (int x = 0; x < 3; ++x) halves[0][x] = halves[1][x];
    read_taps<dtype>(halves[1], row + Image::place(QUAD_BYTES / Image::value));
#pragma unroll
    for (int x = 0; x < 3; ++x) {
      const uint32_t b[2] = {halves[0][x], halves[1][x]};
#pragma unroll
      for (int i = 0; i < Tile::products_m; ++i)
        multiply_into<first, dtype>(moments.group[i][y * 3 + x], a[i], b);
    }
  }
}

// `first`: of the group.
template <class Tile, int bits, Dtype dtype>
__device__ inline void multiply_taps(Moments<Tile>& moments, SharedAddress grad,
                                     SharedAddress window, bool first) {
  if (first)
    multiply_taps<Tile, bits, dtype, true>(moments, grad, window);
  else
    multiply_taps<Tile, bits, dtype, false>(moments, grad, window);
}

// A lane's row of the gradient's matrices, in bytes of a stage: as in Lane.
template <class Tile>
__device__ inline int taps_grad_place() {
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32;
  const int row = warp / Tile::warps_n * (Tile::products_m * 16);
  return grad_place(row + lane % 16, lane / 16) * WORD;
}

// The place of its channel's middle tap at its first position, in bytes of a slot.
template <class Tile, int bits, Dtype dtype>
__device__ inline int taps_input_place(const TapsTask& task) {
  using Image = grad_moments::Image<bits, dtype>;
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32;
  const int channel = warp % Tile::warps_n * 8 + lane / 4;
  return channel * task.channel + Image::piece +
         Image::place(lane % 4 * (WORD / Image::value));
}

template <class Tile, int bits, Dtype dtype>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    grad_moments_taps_kernel(const TapsTask task) {
  using Image = grad_moments::Image<bits, dtype>;
  using Places = TapsPlaces<Tile, bits, dtype>;
  using Memory = TapsMemory<Tile>;
  const GradMomentsTask& m = task.moments;
  unsigned char* shared = dynamic_shared();
  // No copy writes to the borders.
  for (int i = threadIdx.x; i < task.slots * task.slot / WORD; i += Tile::threads)
    reinterpret_cast<float*>(shared + Memory::slots_at)[i] = 0.f;
  const TilePlace tile = tile_place(m, Tile::rows, Tile::columns);
  const SampleRange samples = sample_range(m);
  TapsCopies<Tile, bits, dtype> copies(task, tile, samples);
  __syncthreads();

  const SharedAddress grads = shared_address(shared) + Memory::grad_at;
  const SharedAddress slots = shared_address(shared) + Memory::slots_at;
  // What is left, in products one behind the other, is counted up to zero: neither the
  // end nor how far the copies are takes a register.
  constexpr int depth = 2 * QUAD_BYTES / Image::value;  // positions of a product
  constexpr bool of_samples = Image::units > 1;
  const int positions = of_samples ? Image::unit : m.positions;
  const SampleRange range{(samples.first - samples.end) * (positions / depth), 0};
  Cursor cursor{range.first, 0};
  Slot slot{0};
  Moments<Tile> moments{};
  GroupCount count(m.fresh);
  run_pipeline<Tile, Image::units, 0>(
      moments, m, count, range, cursor,
      [&](int stage, int lead) {
        const int left = -cursor.sample - lead * (QUADS / 2);
        if (left <= 0) return;
        const int units = left / (Image::unit / depth);
        copies.start_grad(task, grads + stage * Memory::grad_stage, units);
        if constexpr (of_samples)
          copies.start_images(task, slots + stage * task.slot, units);
        else
          copies.start_rows(task, slots);
        copies.advance(task);
      },
      [](int) {},
      [&](int stage) {
        const SharedAddress grad =
            grads + stage * Memory::grad_stage + taps_grad_place<Tile>();
        const SharedAddress window = slots +
                                     (of_samples ? stage * task.slot : slot.at) +
                                     taps_input_place<Tile, bits, dtype>(task);
#pragma unroll 1  // more would not fit in the registers
        for (int i = 0; i < QUADS / 2 && cursor.sample < 0; ++i) {
          __syncwarp();  // a product takes the whole warp; loads may have split it
          const int at = of_samples ? i * depth % Image::unit : task.in_band(cursor.at);
          const int unit = i * depth / Image::unit * Places::channels * task.channel;
          multiply_taps<Tile, bits, dtype>(
              moments, flipped(grad, i * 2 * QUAD_BYTES),
              window + unit + Image::place(at),
              count.samples == 0 && (of_samples ? at : cursor.at) == 0);
          ++cursor.sample;
          if constexpr (of_samples) {
            if (at + depth < Image::unit) continue;
          } else {
            cursor.at += depth;
            if (cursor.at < m.positions) continue;
            cursor.at = 0;
          }
          close_sample<Tile>(moments, m, count, cursor.sample == 0);
        }
        if (!of_samples && task.in_band(cursor.at) == 0) slot.move_on(task);
      });
}

}  // namespace fisherprune::cuda::grad_moments
