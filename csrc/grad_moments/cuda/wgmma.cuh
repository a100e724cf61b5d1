// grad_moments for the convolutions of taps.cuh in TF32, on sm_90a alone: products of
// whole warpgroups that read both operands from shared memory, where another warp has
// them copied to.
//
// A stage is of one sample: four rows or more of its image, 16 to 128 positions. Copies
// bring the gradient's rows. The image's rows that the stage sees come three times, the
// columns shifted by one each time: a copy brings 16 channels of a row, and zeros where
// the shifted row leaves the image. So the first row of a tap is the second row of the
// tap above; and all taps, in blocks of eight channels, lie equally far apart: they are
// the columns of one product. Copies round to TF32, to nearest.
//
// Neighbouring blocks have the same rows of the gradient and form a cluster: each
// copies a part of these rows to all of them. Otherwise the second-level cache, which
// gives a multiprocessor some 28 bytes a cycle, would be the bottleneck.
//
// Four threads have a ring of stages filled; two warpgroups multiply. Each stage has
// two barriers: `full` when its bytes have landed, `empty` when the products of all
// warps of the cluster have ended.
//
// For 128 x 128 outputs and 32 positions, tensor cores take 512 cycles at their peak,
// shared memory 537 to 555, and 8 to 19 KB come from that cache: see shared_cycles.py.
//
// Everything else, the order of the additions too, is as in the other kernels.
#pragma once

#include "common/cuda/hopper.cuh"
#include "grad_moments/cuda/taps.cuh"

namespace fisherprune::cuda::grad_moments {

// How images 2^bits wide lie in a stage; distances in bytes.
template <int bits_>
struct WgmmaImage {
  static constexpr int bits = bits_;
  static constexpr int width = 1 << bits, row = width * WORD;
  static constexpr int channels = 16, shifts = 3;
  static constexpr int unit = bits == 2 ? 16 : bits == 5 ? 128 : 64;  // of a stage
  static constexpr int rows = unit >> bits, seen = rows + 2;
  static constexpr int block = 8 * row;               // eight channels of a row
  static constexpr int shift = channels / 8 * block;  // 16 of them
  static constexpr int line = shifts * shift;         // all that is of a row
  static constexpr int bytes = (seen * line + 1023) / 1024 * 1024;
  static constexpr int run = unit < 32 ? unit : 32;  // positions of the gradient
  static constexpr int runs = unit / run;
  static constexpr int grads = PRODUCT_ROWS * unit * WORD;  // bytes of 64 rows

  // Where such a row of the tile's gradient begins in a run.
  __host__ __device__ static constexpr int grad_place(int row, int run_) {
    const int of_run = run_ * PRODUCT_ROWS + row % PRODUCT_ROWS;
    return row / PRODUCT_ROWS * grads + of_run * run * WORD;
  }
  // Where the columns of a product at position t begin.
  __host__ __device__ static constexpr int place(int t) {
    return (t >> bits) * line + (t & (width - 1)) * WORD;
  }
};

struct WgmmaTask {
  TensorMap grads, images;
  GradMomentsTask moments;
};

// A block's shared memory: places to sort what is flushed, the stages, their barriers.
template <class Tile, class Image>
struct WgmmaMemory {
  static constexpr int stages_at = Tile::threads / 32 * RowsOfTaps<Tile>::floats * WORD;
  static constexpr int grad_bytes = Tile::rows * Image::unit * WORD;
  static constexpr int copied = grad_bytes + Tile::warps_n * Image::seen * Image::line;
  static constexpr int stage = grad_bytes + Tile::warps_n * Image::bytes;
  static constexpr int room = (227 << 10) - stages_at - 2 * 8 * Tile::stages;
  static constexpr int stages =
      room / stage < Tile::stages ? room / stage : Tile::stages;
  static constexpr int barriers_at = stages_at + stages * stage;
  static constexpr int bytes = barriers_at + 2 * 8 * stages;
  static_assert(stages >= 2 && stages_at % 1024 == 0 && grad_bytes % 1024 == 0);

  SharedAddress shared;

  __device__ SharedAddress grads(int i) const { return shared + stages_at + i * stage; }
  __device__ SharedAddress images(int i, int side) const {
    return grads(i) + grad_bytes + side * Image::bytes;
  }
  __device__ SharedAddress full(int i) const { return shared + barriers_at + i * 16; }
  __device__ SharedAddress empty(int i) const { return full(i) + 8; }
};

// The stages of a ring in turn; with each round the parity changes.
template <int stages>
struct Ring {
  int stage = 0;
  unsigned parity = 0;

  __device__ void advance() {
    if (++stage < stages) return;
    stage = 0;
    parity ^= 1;
  }
};

constexpr int GRAD_ROWS = 32;       // of a copy of the gradient
constexpr int WGMMA_COPYING = 128;  // threads of a warpgroup that has all copied
// Of a thread that multiplies, and of one of the others; 168 at the start.
constexpr int WGMMA_REGISTERS = 232, WGMMA_REGISTERS_LEFT = 40;

// A thread of each of four warps: copies are issued one after the other.
template <class Tile, int bits>
__device__ inline void copy_stages(const WgmmaTask& task,
                                   const WgmmaMemory<Tile, WgmmaImage<bits>>& memory,
                                   int warp) {
  using Image = WgmmaImage<bits>;
  constexpr int warps = WGMMA_COPYING / 32;
  const GradMomentsTask& m = task.moments;
  const TilePlace tile = tile_place(m, Tile::rows, Tile::columns);
  const int output = tile.conv_group * m.rows + tile.row;
  const int channel = (tile.conv_group * m.columns + tile.column) / TAPS;
  const SampleRange range = sample_range(m);
  const int blocks = cluster_size(), first = warp * blocks + cluster_rank();
  Ring<WgmmaMemory<Tile, Image>::stages> ring;
  for (Cursor next{range.first, 0}; next.sample < range.end;
       next.advance(m.positions, Image::unit), ring.advance()) {
    await_phase(memory.empty(ring.stage), ring.parity ^ 1);
    const SharedAddress full = memory.full(ring.stage);
    if (warp == 0) arrive_expecting(full, memory.copied);
#pragma unroll 1
    for (int i = first; i < Image::runs * (Tile::rows / GRAD_ROWS);
         i += warps * blocks) {
      const int row = i / Image::runs * GRAD_ROWS, run = i % Image::runs;
      const SharedAddress to = memory.grads(ring.stage) + Image::grad_place(row, run);
      const int at = next.at / Image::run + run;
      if (blocks > 1)
        copy_box_to_all(to, task.grads, full, 0, output + row, at, next.sample);
      else
        copy_box(to, task.grads, full, 0, output + row, at, next.sample);
    }
#pragma unroll 1
    for (int i = warp; i < Tile::warps_n * Image::seen; i += warps) {
      const int side = i / Image::seen, y = i % Image::seen;
      const SharedAddress to = memory.images(ring.stage, side) + y * Image::line;
#pragma unroll
      for (int x = 0; x < Image::shifts; ++x)
        copy_box(to + x * Image::shift, task.images, full, x - 1,
                 channel + side * Image::channels, (next.at >> bits) + y - 1,
                 next.sample);
    }
  }
}

// Multiplies a stage, up to 64 positions at a time: for more, registers are missing.
// `grads` and `columns`: of its first eight positions. `first`: of the group.
template <class Image>
__device__ inline void multiply_stage(Results& group, uint64_t grads, uint64_t columns,
                                      bool first) {
  constexpr int some = Image::unit < 64 ? Image::unit : 64;
#pragma unroll 1
  for (int from = 0; from < Image::unit; from += some) {
    begin_products(group);
#pragma unroll
    for (int t = 0; t < some; t += PRODUCT_DEPTH) {
      const int grad = Image::grad_place(0, t / Image::run) + t % Image::run * WORD;
      multiply_matrices(group, moved(grads, grad), moved(columns, Image::place(t)),
                        t > 0 || !first);
    }
    await_products(group);
    grads = moved(grads, Image::grad_place(0, some / Image::run));
    columns = moved(columns, Image::place(some));
    first = false;
  }
}

template <class Tile, int bits>
__device__ inline void multiply_stages(
    const WgmmaTask& task, const WgmmaMemory<Tile, WgmmaImage<bits>>& memory) {
  using Image = WgmmaImage<bits>;
  using Memory = WgmmaMemory<Tile, Image>;
  const GradMomentsTask& m = task.moments;
  const SampleRange range = sample_range(m);
  // The same in all lanes: descriptors are in registers that a warp shares.
  const int group = kept(static_cast<int>(threadIdx.x) / 128);
  const int below = group / Tile::warps_n, side = group % Tile::warps_n;
  constexpr int row = Image::run * WORD;  // of the gradient
  const uint64_t grads = matrix_at(
      shared_bytes_at(memory.grads(0) + below * Image::grads), row, 8 * row, 0);
  const uint64_t columns = matrix_at(shared_bytes_at(memory.images(0, side)),
                                     Image::row, Image::block, Image::line);
  Ring<Memory::stages> ring;
  Cursor cursor{range.first, 0};
  Moments<Tile> moments{};
  GroupCount count(m.fresh);
  while (cursor.sample < range.end) {
    do {
      await_phase(memory.full(ring.stage), ring.parity);
      const int stage = ring.stage * Memory::stage;
      multiply_stage<Image>(moments.group[0], moved(grads, stage),
                            moved(columns, stage),
                            count.samples == 0 && cursor.at == 0);
      const int rank = static_cast<int>(threadIdx.x) % 32;
      if (rank < cluster_size()) arrive_in(rank, memory.empty(ring.stage));
      ring.advance();
      const int sample = cursor.sample;
      cursor.advance(m.positions, Image::unit);
      if (cursor.sample != sample)
        close_sample<Tile>(moments, m, count, cursor.sample == range.end);
    } while (cursor.sample < range.end && count.groups() < FLUSH_GROUPS);
    flush<Tile>(moments, m, count.is_fresh());
    count.since = 0;
  }
}

template <class Tile, int bits>
__global__ void __launch_bounds__(Tile::threads + WGMMA_COPYING, Tile::blocks)
    grad_moments_wgmma_kernel(const __grid_constant__ WgmmaTask task) {
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __trap();  // never launched: see check_wgmma
#else
  using Memory = WgmmaMemory<Tile, WgmmaImage<bits>>;
  const Memory memory{shared_address(dynamic_shared())};
  if (threadIdx.x == 0) {
    for (int i = 0; i < Memory::stages; ++i) {
      init_barrier(memory.full(i), 1);
      init_barrier(memory.empty(i), Tile::threads / 32 * cluster_size());
    }
    publish_barriers();
  }
  meet_cluster();
  if (threadIdx.x >= Tile::threads) {
    give_registers<WGMMA_REGISTERS_LEFT>();
    const int warp = kept(static_cast<int>(threadIdx.x) / 32 - Tile::threads / 32);
    if (is_elected()) copy_stages<Tile, bits>(task, memory, warp);
  } else {
    take_registers<WGMMA_REGISTERS>();
    multiply_stages<Tile, bits>(task, memory);
  }
  meet_cluster();  // others arrive at this block's barriers
#endif
}

}  // namespace fisherprune::cuda::grad_moments
