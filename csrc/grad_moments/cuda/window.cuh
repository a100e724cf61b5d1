// grad_moments for convolutions in TF32, without gathering: the rows of the image that
// some output positions see lie in shared memory as they are, with a border of zeros,
// and the patches are read out of them by the lanes of a product.
//
// A stage of the pipeline holds 32 positions: a unit of one sample; or two units of 16
// positions, or eight of 4, where samples are small. For each stage a block copies the
// output gradient of its rows and the image rows of its channels, 16 bytes at a time.
// Each thread reads its share of a product's operands directly from there, and rounds
// it to TF32 in registers: shared memory is the bottleneck, and would be read and
// written once more if operands were rounded where they lie. Values of 16 bits are
// widened there, one stage early, by the thread that has copied them.
//
// Everything else, the order of the additions too, is as in the other kernels.
#pragma once

#include "grad_moments/cuda/window_load.cuh"

namespace fisherprune::cuda::grad_moments {

// What a lane reads of a stage, in bytes: its row of the gradient's matrices, and for
// each of its products' columns the place of a weight's image value at position lane
// % 4.
template <class Tile, bool small>
struct Lane {
  int grad;  // the matrices' first quad in the first stage
  int input[Tile::products_n];

  __device__ Lane(const WindowTask& task, const TilePlace& tile) {
    const GradMomentsTask& m = task.moments;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = warp / Tile::warps_n * (Tile::products_m * 16);
    // Matrices of quads of even and of odd number, or of more rows.
    grad = kept(
        (small ? grad_place(row + lane, 0) : grad_place(row + lane % 16, lane / 16)) *
        WORD);
    const int taps = m.kernel_h * m.kernel_w, first = tile.column / taps;
    const int column =
        tile.column + warp % Tile::warps_n * (Tile::products_n * 8) + lane / 4;
#pragma unroll
    for (int j = 0; j < Tile::products_n; ++j) {
      // Columns that do not exist read something that does, and nobody uses it.
      const int exists = column + j * 8 < m.columns ? column + j * 8 : tile.column;
      const int channel = (exists / taps - first) * task.window.channel;
      input[j] = kept((channel + place_of(task, exists % taps, lane % 4)) * WORD);
    }
  }

  // The place of a tap's value at position t, in a channel's window. An image of 2 x 2
  // has zeros behind it, which stand for what lies outside.
  __device__ static int place_of(const WindowTask& task, int tap, int t) {
    const GradMomentsTask& m = task.moments;
    const Operand& image = m.input;
    const int dy = tap / m.kernel_w * m.dilation_h;
    const int dx = tap % m.kernel_w * m.dilation_w - image.pad_w;
    if constexpr (!small)
      return dy * task.window.pitch + dx + task.window.left + t * image.step_w;
    const int h = t / 2 * image.step_h + dy - image.pad_h;
    const int w = t % 2 * image.step_w + dx;
    return h >= 0 && h < 2 && w >= 0 && w < 2 ? h * 2 + w : SMALL;
  }

  __device__ uint32_t read_input(int j, SharedAddress window) const {
    return __float_as_uint(load_shared(window + input[j]));
  }
};

// Multiplies 8 positions: quads `quad` and `quad + 1` of the stage, whose first
// positions are at `at` and `next` in the window. For a 3 x 3 filter, the words that a
// warp reads at once lie in up to four runs of six. A run begins 8 or 24 banks behind
// the one before, also where the next channel begins: no two words share a bank. Where
// every second position is read, one read in three takes twice the time.
template <class Tile, Dtype dtype, bool first>
__device__ inline void multiply_window(Moments<Tile>& moments,
                                       const Lane<Tile, false>& lane,
                                       SharedAddress grad, int quad, SharedAddress at,
                                       SharedAddress next) {
  uint32_t a[Tile::products_m][4];
  const SharedAddress row = grad + (lane.grad ^ quad * 4 * WORD);
#pragma unroll
  for (int i = 0; i < Tile::products_m; ++i) {
    read_matrices(a[i], row + i * 16 * WINDOW * WORD);
    round_operand<dtype>(a[i]);
  }
#pragma unroll
  for (int j = 0; j < Tile::products_n; ++j) {
    uint32_t b[2] = {lane.read_input(j, at), lane.read_input(j, next)};
    round_operand<dtype>(b);
#pragma unroll
    for (int i = 0; i < Tile::products_m; ++i)
      multiply_into<first>(moments.group[i][j], a[i], b);
  }
}

// Multiplies the 4 positions of a small image. Eight weights of 3 x 3 filters belong to
// two channels: their 16 words, zeros included, lie in different banks.
template <class Tile, Dtype dtype, bool first>
__device__ inline void multiply_small(Moments<Tile>& moments,
                                      const Lane<Tile, true>& lane, SharedAddress grad,
                                      int quad, SharedAddress window) {
  uint32_t a[Tile::products_m / 2][2][2];
  const SharedAddress row = grad + (lane.grad ^ quad * 4 * WORD);
#pragma unroll
  for (int i = 0; i < Tile::products_m / 2; ++i) {
    uint32_t words[4];
    read_matrices(words, row + i * 32 * WINDOW * WORD);
    round_operand<dtype>(words);
#pragma unroll
    for (int e = 0; e < 4; ++e) a[i][e / 2][e % 2] = words[e];
  }
#pragma unroll
  for (int j = 0; j < Tile::products_n; ++j) {
    uint32_t b[1] = {lane.read_input(j, window)};
    round_operand<dtype>(b);
#pragma unroll
    for (int i = 0; i < Tile::products_m; ++i)
      multiply_into<first>(moments.group[i][j], a[i / 2][i % 2], b);
  }
}

// Where the positions of a unit lie in its window, in bytes; 2^bits of them are in one
// row. The compiler knows the distances where windows have the usual pitch for
// `stride`; then a read needs no addition. For stride 0 the task has the distances.
template <int bits, int stride>
struct Positions {
  int row, step;

  __device__ explicit Positions(const WindowTask& task)
      : row(stride ? stride * usual_pitch(1 << bits, stride) * WORD : task.row_step),
        step((stride ? stride : task.moments.input.step_w) * WORD) {}
  __device__ int operator()(int t) const {
    return (t >> bits) * row + (t & ((1 << bits) - 1)) * step;
  }
};

// Multiplies one unit, whose quads begin at `quad`. `first`: of the group.
template <class Tile, int bits, int stride, Dtype dtype>
__device__ inline void multiply_unit(Moments<Tile>& moments, const WindowTask& task,
                                     const Lane<Tile, false>& lane, SharedAddress grad,
                                     int quad, SharedAddress window, bool first) {
  const Positions<bits, stride> at(task);
  if (first)
    multiply_window<Tile, dtype, true>(moments, lane, grad, quad, window,
                                       window + at(4));
  else
    multiply_window<Tile, dtype, false>(moments, lane, grad, quad, window,
                                        window + at(4));
  static_assert(WINDOW == 2 * SLAB && SLAB == 16,
                "two or four products of 8 positions");
  const auto more = [&](int t) {
    multiply_window<Tile, dtype, false>(moments, lane, grad, quad + t / 4,
                                        window + at(t), window + at(t + 4));
  };
  more(8);
  if (task.window.unit == SLAB) return;
  more(16);
  more(24);
}

template <class Tile, int bits, int stride, Dtype dtype>
__device__ inline void multiply_unit(Moments<Tile>& moments, const WindowTask&,
                                     const Lane<Tile, true>& lane, SharedAddress grad,
                                     int quad, SharedAddress window, bool first) {
  if (first)
    multiply_small<Tile, dtype, true>(moments, lane, grad, quad, window);
  else
    multiply_small<Tile, dtype, false>(moments, lane, grad, quad, window);
}

// Each block multiplies its tile, see above. 2^bits positions are in one row, `stride`
// apart in windows of the usual pitch; bits = 1 stands for images of 2 x 2.
template <class Tile, int bits, int stride, Dtype dtype>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    grad_moments_window_kernel(const WindowTask task) {
  const GradMomentsTask& m = task.moments;
  const Window& w = task.window;
  const WindowMemory<Tile> memory(w);
  const TilePlace tile = tile_place(m, Tile::rows, Tile::columns);
  prepare_windows<Tile, dtype>(task, memory, tile);
  const SampleRange range = sample_range(m);
  Copies<Tile, dtype> copies(task, tile, range);
  const Lane<Tile, bits == 1> lane(task, tile);
  __syncthreads();

  constexpr int grad_bytes = Tile::rows * WINDOW * WORD;
  const int windows_bytes = w.units * w.bytes;
  const SharedAddress pieces = shared_address(memory.pieces);
  const SharedAddress grad_address = shared_address(memory.grad);
  const SharedAddress windows_address =  // of memory.windows; it takes no register
      grad_address + Tile::stages * grad_bytes;
  Cursor cursor = copies.next;
  Moments<Tile> moments{};
  GroupCount count(m.fresh);
  constexpr bool widens = dtype != Dtype::float32;
  run_pipeline<Tile, WINDOW / SMALL, widens ? 1 : 0>(
      moments, m, count, range, cursor,
      [&](int stage, int) {
        if (copies.next.sample >= range.end) return;
        copies.start_grad(task, grad_address + stage * grad_bytes);
        copies.start_windows(task, pieces, windows_address + stage * windows_bytes,
                             range.end);
        copies.advance(task);
      },
      [&](int stage) {
        if constexpr (widens)
          copies.widen(task, pieces, grad_address + stage * grad_bytes,
                       windows_address + stage * windows_bytes);
      },
      [&](int stage) {
        const SharedAddress grad = grad_address + stage * grad_bytes;
        SharedAddress window = windows_address + stage * windows_bytes;
#pragma unroll 1
        for (int t = 0; t < WINDOW && cursor.sample < range.end; t += w.unit) {
          __syncwarp();  // a product takes the whole warp; loads may have split it
          multiply_unit<Tile, bits, stride, dtype>(
              moments, task, lane, grad, t / 4,
              window + first_column<bits>(m, cursor.at) * WORD,
              count.samples == 0 && cursor.at == 0);
          window += w.bytes;
          const int sample = cursor.sample;
          cursor.advance(m.positions, w.unit);
          if (cursor.sample != sample)
            close_sample<Tile>(moments, m, count, cursor.sample == range.end);
        }
      });
}

}  // namespace fisherprune::cuda::grad_moments
