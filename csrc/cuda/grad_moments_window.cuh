// grad_moments for convolutions of float32 images in TF32, without gathering: the rows
// of the image that some output positions see lie in shared memory as they are, with a
// border of zeros, and the patches are read out of them by the lanes of a product.
//
// A stage of the pipeline holds 32 positions: a unit of one sample, or two units of 16
// positions where samples are that small. Per stage a block copies the output gradient
// of its rows and the image rows of its channels, 16 bytes at a time; each thread's
// share of a product's operands then comes straight from there, and each value is
// rounded to TF32 once a warp.
//
// Everything else, and what is added in which order, is as in the other kernel.
#pragma once

#include "grad_moments_kernel.cuh"

namespace fisherprune {

constexpr int WINDOW = 32;  // positions of a stage

// Where a unit's image rows lie in shared memory, in words.
struct Window {
  int unit;         // positions of a stage that are of one sample: 16 or 32
  int column_bits;  // of which 2^column_bits lie side by side
  int rows;         // of the image, that a unit sees
  int left;         // border before a row; the border behind it is the next row's
  int pitch;        // from row to row, see the banks below
  int channel;      // from channel to channel, as if its rows went on
  int channels;     // that a tile's weights may belong to
};

struct WindowTask {
  GradMomentsTask moments;
  Window window;
};

// Sixteen bytes of a channel's rows, on their way to a window.
struct alignas(16) Piece {
  int64_t offset;  // in bytes, from the image's first channel and the window's top row
  int row;         // of the window
  int to;          // word of the window
};

inline int pieces_of(const Window& window, int width) {
  return window.channels * window.rows * (width / 4);
}

// A block's shared memory. The windows of a stage lie one after the other.
template <class Tile>
struct WindowMemory {
  Piece* pieces;
  float* grad;
  float* windows;
  int window_words, stage_words;  // of a window, of a stage's windows

  __device__ explicit WindowMemory(const Window& window, int count)
      : pieces(reinterpret_cast<Piece*>(dynamic_shared())),
        grad(reinterpret_cast<float*>(pieces + count)),
        windows(grad + Tile::stages * Tile::rows * WINDOW),
        window_words(window.channels * window.channel),
        stage_words(WINDOW / window.unit * window_words) {}
};

template <class Tile>
size_t window_memory_bytes(const Window& window, int width) {
  const size_t words = static_cast<size_t>(WINDOW / window.unit) * window.channels *
                       static_cast<size_t>(window.channel);
  return pieces_of(window, width) * sizeof(Piece) +
         Tile::stages * (Tile::rows * WINDOW + words) * sizeof(float);
}

// Lists the pieces of a window and clears all windows: no copy touches their borders.
template <class Tile>
__device__ inline void prepare_windows(const WindowTask& task,
                                       const WindowMemory<Tile>& memory, int pieces,
                                       const TilePlace& tile) {
  const GradMomentsTask& m = task.moments;
  const Window& w = task.window;
  const int across = m.input.width / 4, taps = m.kernel_h * m.kernel_w;
  const int first = tile.column / taps, channels = m.columns / taps;
  for (int i = threadIdx.x; i < pieces; i += Tile::threads) {
    const int row = i / across % w.rows, channel = i / across / w.rows;
    const int64_t from = static_cast<int64_t>(tile.conv_group) * channels + first;
    memory.pieces[i] = {
        (from + channel) * m.input_channel + row * m.input.stride_h + i % across * 16,
        first + channel < channels ? row : OUTSIDE,
        channel * w.channel + row * w.pitch + w.left + i % across * 4};
  }
  for (int i = threadIdx.x; i < Tile::stages * memory.stage_words; i += Tile::threads)
    memory.windows[i] = 0.f;
}

// The word of quad `quad` of row `row` in a stage of the output gradient: 8 rows that
// are read together have their quads in different banks.
__device__ inline int grad_place(int row, int quad) {
  return row * WINDOW + ((quad ^ row) & 7) * 4;
}

// A thread's share of the output gradient: one quad of positions of some rows.
template <class Tile>
struct GradCopies {
  static constexpr int quads = WINDOW / 4, step = Tile::threads / quads;
  static_assert(step % 8 == 0 && Tile::rows % step == 0);
  const char* from;  // the quad in the first row, where sample and position are 0
  int rows;          // that exist, from the first on
  int to;            // the quad's word

  __device__ GradCopies(const WindowTask& task, const TilePlace& tile) {
    const GradMomentsTask& m = task.moments;
    const int first = tile.row + static_cast<int>(threadIdx.x) / quads;
    const int64_t row = static_cast<int64_t>(tile.conv_group) * m.rows + first;
    from = m.grad.data + row * m.grad_channel + sample(task) * m.grad.sample_stride +
           at(task) * sizeof(float);
    rows = m.rows - first;
    to = opaque(grad_place(threadIdx.x / quads, threadIdx.x % quads));
  }

  // Where the quad lies behind the start of the stage.
  __device__ static int sample(const WindowTask& task) {
    return static_cast<int>(threadIdx.x) % quads * 4 >= task.window.unit;
  }
  __device__ static int at(const WindowTask& task) {
    return static_cast<int>(threadIdx.x) % quads * 4 & (task.window.unit - 1);
  }

  __device__ void start(const WindowTask& task, float* grad, const Cursor& cursor,
                        int end) const {
    const GradMomentsTask& m = task.moments;
    const bool exists =
        cursor.sample + sample(task) < end && cursor.at + at(task) < m.positions;
    const char* row = from + cursor.sample * m.grad.sample_stride +
                      cursor.at * static_cast<int64_t>(sizeof(float));
#pragma unroll
    for (int i = 0; i < Tile::rows; i += step) {
      // Without a byte to read the address need not exist.
      copy16_async(grad + to + i * WINDOW, reinterpret_cast<const float*>(row),
                   exists && i < rows ? 16 : 0);
      row += step * m.grad_channel;
    }
  }
};

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

template <class Tile>
__device__ inline void load_window(const WindowTask& task, const Piece* pieces,
                                   int count, float* window, const Cursor& cursor) {
  const Operand& input = task.moments.input;
  const int top = top_row(task.moments, cursor.at);
  const char* from = input.data + cursor.sample * input.sample_stride +
                     top * static_cast<int64_t>(input.stride_h);
#pragma unroll 1  // mostly there is one
  for (int i = threadIdx.x; i < count; i += Tile::threads) {
    const int4 words = *reinterpret_cast<const int4*>(pieces + i);
    const uint64_t high = static_cast<uint32_t>(words.y);
    const int64_t offset = static_cast<int64_t>(high << 32 | uint32_t(words.x));
    const bool inside =
        static_cast<unsigned>(top + words.z) < static_cast<unsigned>(input.height);
    copy16_async(window + words.w, reinterpret_cast<const float*>(from + offset),
                 inside ? 16 : 0);
  }
}

constexpr int WORD = sizeof(float);  // bytes

// What a lane reads of a stage, in bytes: its row of the gradient's matrices, and for
// each of its products' columns the place of a weight's image value at position lane
// % 4.
template <class Tile>
struct Lane {
  int grad;  // the matrices' first quad in the first stage
  int input[Tile::products_n];

  __device__ Lane(const WindowTask& task, const TilePlace& tile) {
    const GradMomentsTask& m = task.moments;
    const Window& w = task.window;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = warp / Tile::warps_n * (Tile::products_m * 16) + lane % 16;
    // Matrices of quads of even and of odd number.
    grad = grad_place(row, lane / 16) * WORD;
    const int taps = m.kernel_h * m.kernel_w, first = tile.column / taps;
    const int column =
        tile.column + warp % Tile::warps_n * (Tile::products_n * 8) + lane / 4;
#pragma unroll
    for (int j = 0; j < Tile::products_n; ++j) {
      // Columns that don't exist read something that does, for nobody.
      const int exists = column + j * 8 < m.columns ? column + j * 8 : tile.column;
      const int tap = exists % taps;
      const int word = (exists / taps - first) * w.channel +
                       tap / m.kernel_w * m.dilation_h * w.pitch +
                       tap % m.kernel_w * m.dilation_w + w.left - m.input.pad_w +
                       lane % 4 * m.input.step_w;
      input[j] = word * WORD;
    }
  }

  __device__ uint32_t read_input(int j, SharedAddress window) const {
    return to_tf32(load_shared(window + input[j]));
  }
};

// One product of 8 positions: quads `quad` and `quad + 1` of the stage, whose first
// positions are at `at` and `next` in the window. The words that a warp reads at once
// lie in up to four runs of six for a 3 x 3 filter. A run is 8 or 24 banks behind the
// one before, also from a channel's last run to the next channel's first: no two words
// meet in a bank. Where every second position is read, one read in three takes two
// turns.
template <class Tile, bool first>
__device__ inline void multiply_window(Moments<Tile>& moments, const Lane<Tile>& lane,
                                       SharedAddress grad, int quad, SharedAddress at,
                                       SharedAddress next) {
  uint32_t a[Tile::products_m][4];
  const SharedAddress row = grad + (lane.grad ^ quad * 4 * WORD);
#pragma unroll
  for (int i = 0; i < Tile::products_m; ++i) {
    read_matrices(a[i], row + i * 16 * WINDOW * WORD);
#pragma unroll
    for (int e = 0; e < 4; ++e) a[i][e] = to_tf32(__uint_as_float(a[i][e]));
  }
#pragma unroll
  for (int j = 0; j < Tile::products_n; ++j) {
    const uint32_t b[2] = {lane.read_input(j, at), lane.read_input(j, next)};
#pragma unroll
    for (int i = 0; i < Tile::products_m; ++i)
      multiply_into<first>(moments.group[i][j], a[i], b);
  }
}

// Where the positions of a unit lie in its window, in bytes, 2^bits side by side. All
// is known to the compiler but the distance of rows, and of positions unless it is 1:
// then a read takes one addition, or none.
template <int bits, int known_step>
struct Positions {
  int row, step;

  __device__ explicit Positions(const WindowTask& task)
      : row(opaque(task.moments.input.step_h * task.window.pitch * WORD)),
        step((known_step ? known_step : task.moments.input.step_w) * WORD) {}
  __device__ int operator()(int t) const {
    return (t >> bits) * row + (t & ((1 << bits) - 1)) * step;
  }
};

// The products of one unit, whose quads begin at `quad`; `first` of the group.
template <class Tile, int bits, int step>
__device__ inline void multiply_unit(Moments<Tile>& moments, const WindowTask& task,
                                     const Lane<Tile>& lane, SharedAddress grad,
                                     int quad, SharedAddress window, bool first) {
  __syncwarp();  // a product takes the whole warp; loads and flushes may have split it
  const Positions<bits, step> at(task);
  if (first)
    multiply_window<Tile, true>(moments, lane, grad, quad, window, window + at(4));
  else
    multiply_window<Tile, false>(moments, lane, grad, quad, window, window + at(4));
  const auto more = [&](int t) {
    multiply_window<Tile, false>(moments, lane, grad, quad + t / 4, window + at(t),
                                 window + at(t + 4));
  };
  more(8);
  if (task.window.unit == SLAB) return;
  more(16);
  more(24);
}

// 2^bits positions lie side by side, `step` apart, or as far as the task says if 0.
template <class Tile, int bits, int step>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    grad_moments_window_kernel(const WindowTask task) {
  const GradMomentsTask& m = task.moments;
  const Window& w = task.window;
  const int pieces = w.channels * w.rows * (m.input.width / 4);
  const WindowMemory<Tile> memory(w, pieces);
  const TilePlace tile = tile_place(m, Tile::rows, Tile::columns);
  prepare_windows<Tile>(task, memory, pieces, tile);
  const GradCopies<Tile> grad_copies(task, tile);
  const Lane<Tile> lane(task, tile);
  __syncthreads();

  const SharedAddress grad_address = shared_address(memory.grad);
  const SharedAddress windows_address =  // of memory.windows; it takes no register
      grad_address + Tile::stages * Tile::rows * WINDOW * WORD;
  const SampleRange range = sample_range(m);
  Cursor loaded{range.first, 0}, cursor = loaded;
  Moments<Tile> moments{};
  GroupCount count;
  count.fresh = m.fresh;
  run_pipeline<Tile::stages>(
      range, cursor,
      [&](int stage) {
        if (loaded.sample >= range.end) return;
        grad_copies.start(task, memory.grad + stage * Tile::rows * WINDOW, loaded,
                          range.end);
        float* window = memory.windows + stage * memory.stage_words;
#pragma unroll 1
        for (int t = 0; t < WINDOW && loaded.sample < range.end; t += w.unit) {
          load_window<Tile>(task, memory.pieces, pieces, window, loaded);
          window += memory.window_words;
          loaded.advance(m.positions, w.unit);
        }
      },
      [&](int stage) {
        const SharedAddress grad = grad_address + stage * Tile::rows * WINDOW * WORD;
        SharedAddress window = windows_address + stage * memory.stage_words * WORD;
#pragma unroll 1
        for (int t = 0; t < WINDOW && cursor.sample < range.end; t += w.unit) {
          multiply_unit<Tile, bits, step>(
              moments, task, lane, grad, t / 4,
              window + first_column<bits>(m, cursor.at) * WORD,
              count.samples == 0 && cursor.at == 0);
          window += memory.window_words * WORD;
          const int sample = cursor.sample;
          cursor.advance(m.positions, w.unit);
          if (cursor.sample != sample)
            close_sample<Tile>(moments, m, count, cursor.sample == range.end);
        }
      });
}

}  // namespace fisherprune
