// grad_moments: a block owns a tile of the weight gradient (output channels x weights
// of a filter) and a range of sample groups. For each sample it multiplies D[channels x
// positions] with the patches [positions x weights] on the tensor cores: 16 positions
// at a time from shared memory, or two samples of at most 8. At the end of each group
// it adds the gradient and its square to two more sets of registers, and these to
// memory after every 256 groups. Where there are few groups, a block has a part of one.
//
// Memory traffic of a block: its rows of D and its patches once a sample, by cp.async
// several slabs ahead; two floats an output every 256 groups. Per-sample gradients and
// unfolded patches exist in registers and shared memory only.
//
// Deterministic: which thread adds what, and in which order, depends only on the shape
// and on the number of multiprocessors.
#pragma once

#include "grad_moments/cuda/load.cuh"
#include "grad_moments/cuda/tile.cuh"

namespace fisherprune::cuda::grad_moments {

struct GradMomentsTask {
  Operand grad, input;
  int64_t grad_channel, input_channel;  // strides of the channels, in bytes
  Divider width_divider;
  int out_width, positions;
  int rows, columns;  // of a convolution group: outputs, weights of a filter
  int kernel_h, kernel_w, dilation_h, dilation_w;
  int row_tiles, column_tiles;
  int samples, group_size;
  int parts;   // of a group, each for a block of its own; 1: blocks have whole groups
  float* sum;  // of split 0; the sums of the others follow, split_stride apart
  float* sum_sq;  // null where groups are in parts
  int64_t split_stride;
  bool fresh;  // nothing is in sum and sum_sq yet
};

// Where a block's tile lies.
struct TilePlace {
  int conv_group, row, column;
};

__device__ inline TilePlace tile_place(const GradMomentsTask& task, int rows,
                                       int columns) {
  const int column_tile = blockIdx.x % task.column_tiles;
  const int rest = blockIdx.x / task.column_tiles;
  return {rest / task.row_tiles, rest % task.row_tiles * rows, column_tile * columns};
}

// The weight of a tile's column. Columns run over channels first where channels are
// neighbours in memory.
struct Weight {
  int channel, tap;
};

__device__ inline Weight weight_of(const GradMomentsTask& task, int column) {
  const int taps = task.kernel_h * task.kernel_w;
  if (task.input.order != Order::rows) return {column / taps, column % taps};
  const int channels = task.columns / taps;
  return {column % channels, column / channels};
}

__device__ inline Row patch_row(const GradMomentsTask& task, int conv_group,
                                int column) {
  if (column >= task.columns) return {0, OUTSIDE, OUTSIDE};
  const Weight weight = weight_of(task, column);
  const int64_t channels = task.columns / (task.kernel_h * task.kernel_w);
  const int dy = weight.tap / task.kernel_w * task.dilation_h;
  const int dx = weight.tap % task.kernel_w * task.dilation_w;
  const int64_t channel = conv_group * channels + weight.channel;
  return {channel * task.input_channel + dy * task.input.stride_h +
              dx * task.input.stride_w,
          dy, dx};
}

__device__ inline Row grad_row(const GradMomentsTask& task, int conv_group, int row) {
  if (row >= task.rows) return {0, OUTSIDE, OUTSIDE};
  const int64_t channel = static_cast<int64_t>(conv_group) * task.rows + row;
  return {channel * task.grad_channel, 0, 0};
}

// A block's shared memory: the rows of its tile, then the stages of the pipeline.
template <class Tile>
struct Shared {
  static constexpr int slab_rows = Tile::rows + Tile::columns;
  Row rows[slab_rows];
  float slab[Tile::stages][Tile::slabs][slab_rows * SLAB];
};

template <class Tile>
__device__ inline void find_rows(const GradMomentsTask& task, const TilePlace& tile,
                                 Row* rows) {
  for (int i = threadIdx.x; i < Tile::rows + Tile::columns; i += Tile::threads)
    rows[i] = i < Tile::rows
                  ? grad_row(task, tile.conv_group, tile.row + i)
                  : patch_row(task, tile.conv_group, tile.column + i - Tile::rows);
}

// The place of a column's weight in the filter.
__device__ inline int weight_place(const GradMomentsTask& task, int column) {
  if (task.input.order != Order::rows) return column;
  const Weight weight = weight_of(task, column);
  return weight.channel * task.kernel_h * task.kernel_w + weight.tap;
}

// Adds a column of a thread's values to the sums that begin at `at`. It reads the whole
// column before it writes: the compiler moves no load across a store that might go to
// the same place, and each value would wait for memory.
template <class Tile>
__device__ inline void flush_column(const typename Moments<Tile>::Values& values, int j,
                                    int side, float* at, int64_t row_words, int rows,
                                    float scale, bool fresh) {
  float before[Tile::products_m][2];
#pragma unroll
  for (int i = 0; i < Tile::products_m; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      before[i][half] = !fresh && i * 16 + half * 8 < rows
                            ? at[(i * 16 + half * 8) * row_words]
                            : 0.f;
#pragma unroll
  for (int i = 0; i < Tile::products_m; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (i * 16 + half * 8 < rows)
        at[(i * 16 + half * 8) * row_words] =
            fmaf(values[i][j][half * 2 + side], scale, before[i][half]);
}

// Adds the registers to this split's sums and clears them. It finds the tile's place
// again: if that were kept, the products would have fewer registers. It also clears the
// closed group, which nobody reads: so its registers are free for what is read here.
template <class Tile>
__device__ inline void flush(Moments<Tile>& moments, const GradMomentsTask& task,
                             bool fresh) {
  const TilePlace tile = tile_place(task, Tile::rows, Tile::columns);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = tile.row + warp / Tile::warps_n * (Tile::products_m * 16) + lane / 4;
  const int column =
      tile.column + warp % Tile::warps_n * (Tile::products_n * 8) + lane % 4 * 2;
  const int64_t output = static_cast<int64_t>(tile.conv_group) * task.rows + row;
  const int64_t first = blockIdx.y * task.split_stride + output * task.columns;
  const float scale = 1.f / static_cast<float>(task.group_size);
#pragma unroll
  for (int j = 0; j < Tile::products_n; ++j)
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      if (column + j * 8 + side >= task.columns) continue;
      const int64_t at = first + weight_place(task, column + j * 8 + side);
      flush_column<Tile>(moments.sum, j, side, task.sum + at, task.columns,
                         task.rows - row, scale, fresh);
      if (task.sum_sq)
        flush_column<Tile>(moments.sum_sq, j, side, task.sum_sq + at, task.columns,
                           task.rows - row, scale * scale, fresh);
    }
  for_each_value<Tile>([&](int i, int j, int e) {
    moments.group[i][j][e] = moments.sum[i][j][e] = moments.sum_sq[i][j][e] = 0.f;
  });
}

struct SampleRange {
  int first, end;
};

// The samples of a block that has whole groups.
__device__ inline SampleRange range_of_groups(const GradMomentsTask& task) {
  const int64_t groups = (task.samples - 1) / task.group_size + 1;
  const int64_t first = groups * blockIdx.y / gridDim.y * task.group_size;
  const int64_t end = groups * (blockIdx.y + 1) / gridDim.y * task.group_size;
  return {static_cast<int>(first),
          end < task.samples ? static_cast<int>(end) : task.samples};
}

__device__ inline SampleRange range_of_group(int samples, int group_size, int group) {
  const int first = group * group_size, left = samples - first;
  return {first, first + (left < group_size ? left : group_size)};
}

// The samples of one part of a group; a group of few samples has empty parts.
__device__ inline SampleRange range_of_part(const SampleRange& group, int parts,
                                            int part) {
  const int64_t size = group.end - group.first;
  return {group.first + static_cast<int>(size * part / parts),
          group.first + static_cast<int>(size * (part + 1) / parts)};
}

// A block's samples.
__device__ inline SampleRange sample_range(const GradMomentsTask& task) {
  if (task.parts == 1) return range_of_groups(task);
  const int block = blockIdx.y;
  return range_of_part(
      range_of_group(task.samples, task.group_size, block / task.parts), task.parts,
      block % task.parts);
}

template <class Tile, bool async>
__device__ inline void load_stage(const GradMomentsTask& task, Shared<Tile>& shared,
                                  int stage, Cursor& cursor, int end) {
#pragma unroll 1
  for (int s = 0; s < Tile::slabs && cursor.sample < end; ++s) {
    float* slab = shared.slab[stage][s];
    load_slab<Tile::threads, Tile::rows, async>(task.grad, shared.rows, slab, cursor,
                                                end, task.width_divider, task.out_width,
                                                task.positions);
    load_slab<Tile::threads, Tile::columns, async>(
        task.input, shared.rows + Tile::rows, slab + Tile::rows * SLAB, cursor, end,
        task.width_divider, task.out_width, task.positions);
    cursor.advance(task.positions);
    if (are_short(task.positions)) ++cursor.sample;
  }
}

// Samples of the open group and groups since the last flush.
struct GroupCount {
  int samples = 0, groups = 0;
  bool fresh;
};

// After a sample: closes its group where it was the group's last.
template <class Tile>
__device__ inline void close_sample(Moments<Tile>& moments, const GradMomentsTask& task,
                                    GroupCount& count, bool last) {
  if (++count.samples < task.group_size && !last) return;
  close_group<Tile>(moments, count.samples, task.group_size);
  count.samples = 0;
  ++count.groups;
}

// The two samples of a slab, or the last one alone.
template <class Tile, Products products>
__device__ inline void multiply_samples(Moments<Tile>& moments,
                                        const GradMomentsTask& task, const float* slab,
                                        Cursor& cursor, GroupCount& count, int end) {
  __syncwarp();
  const Fragments<Tile> read = read_fragments<Tile>(slab);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (cursor.sample == end) return;
    multiply_half<Tile, products>(moments, read, half == 1, count.samples == 0);
    close_sample<Tile>(moments, task, count, ++cursor.sample == end);
  }
}

// A slab of a sample of more positions.
template <class Tile, Products products>
__device__ inline void multiply_positions(Moments<Tile>& moments,
                                          const GradMomentsTask& task,
                                          const float* slab, Cursor& cursor,
                                          GroupCount& count, int end) {
  multiply_slab<Tile, products>(moments, slab, count.samples == 0 && cursor.at == 0);
  const int sample = cursor.sample;
  cursor.advance(task.positions);
  if (cursor.sample != sample)
    close_sample<Tile>(moments, task, count, cursor.sample == end);
}

// The pipeline of all kernels: load(stage) starts the copies of what comes next, and
// multiply(stage) works on what has landed, until `cursor` has passed the range. With
// `ahead`, prepare(stage) comes in between, one stage early: each thread may change
// what it has copied. Now and then, between two stages, the sums are flushed; that has
// a loop of its own, because otherwise the compiler would move registers to and fro in
// each stage. A stage holds up to `samples` samples, or a part of one.
template <class Tile, int samples, int ahead, class Load, class Prepare, class Multiply>
__device__ inline void run_pipeline(Moments<Tile>& moments, const GradMomentsTask& task,
                                    GroupCount& count, const SampleRange& range,
                                    const Cursor& cursor, Load load, Prepare prepare,
                                    Multiply multiply) {
  constexpr int stages = Tile::stages;
  static_assert(stages >= 2 + ahead);
  static_assert(STAGE_SAMPLES % samples == 0, "see FLUSH_GROUPS");
  const auto behind = [](int stage) { return stage + 1 < stages ? stage + 1 : 0; };
  int fill = 1 - stages;  // below 0 while the pipeline is filled
  int stage = 0, next = 0;
  while (cursor.sample < range.end) {
    do {
      const bool landed = fill >= -ahead;
      if (landed) {
        await_copies<stages - 2 - ahead>();
        // Everybody's copies have landed, and nobody reads the stage that is next.
        __syncthreads();
      }
      load(next);
      commit_copies();
      next = behind(next);
      if (ahead && landed) prepare(fill < 0 ? stage : behind(stage));
      if (fill++ < 0) continue;
      fill = 0;
      multiply(stage);
      stage = behind(stage);
    } while (cursor.sample < range.end && count.groups < FLUSH_GROUPS);
    flush<Tile>(moments, task, count.fresh);
    count.groups = 0;
    count.fresh = false;
  }
}

template <class Tile, Products products, bool async>
__global__ void __launch_bounds__(
    Tile::threads, resident_blocks<Tile, products != Products::rounded>())
    grad_moments_kernel(const GradMomentsTask task) {
  Shared<Tile>& shared = *reinterpret_cast<Shared<Tile>*>(dynamic_shared());
  find_rows<Tile>(task, tile_place(task, Tile::rows, Tile::columns), shared.rows);
  __syncthreads();

  const SampleRange range = sample_range(task);
  Cursor loaded{range.first, 0}, cursor = loaded;
  Moments<Tile> moments{};
  GroupCount count;
  count.fresh = task.fresh;
  run_pipeline<Tile, 2 * Tile::slabs, 0>(  // two short samples in each slab
      moments, task, count, range, cursor,
      [&](int stage) {
        load_stage<Tile, async>(task, shared, stage, loaded, range.end);
      },
      [](int) {},
      [&](int stage) {
#pragma unroll 1
        for (int s = 0; s < Tile::slabs && cursor.sample < range.end; ++s) {
          const float* slab = shared.slab[stage][s];
          if (are_short(task.positions))
            multiply_samples<Tile, products>(moments, task, slab, cursor, count,
                                             range.end);
          else
            multiply_positions<Tile, products>(moments, task, slab, cursor, count,
                                               range.end);
        }
      });
}

// Each thread adds the sums of all splits for one weight, in order.
constexpr int COMBINE_THREADS = 256;

__global__ void __launch_bounds__(COMBINE_THREADS)
    combine_moments(const float* partial, int64_t size, int splits, float* sum,
                    float* sum_sq) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * COMBINE_THREADS + threadIdx.x;
  if (at >= size) return;
  float total = 0.f, total_sq = 0.f;
  for (int split = 0; split < splits; ++split) {
    total += partial[2 * split * size + at];
    total_sq += partial[(2 * split + 1) * size + at];
  }
  sum[at] += total;
  sum_sq[at] += total_sq;
}

// The same where blocks had parts of groups. A part is the mean gradient of its
// samples: each thread adds a group's parts in order, then the group's gradient and its
// square.
__global__ void __launch_bounds__(COMBINE_THREADS)
    combine_parts(const float* partial, int64_t size, int samples, int group_size,
                  int parts, float* sum, float* sum_sq) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * COMBINE_THREADS + threadIdx.x;
  if (at >= size) return;
  partial += at;
  float total = 0.f, total_sq = 0.f;
  for (int group = 0; group * group_size < samples; ++group) {
    const SampleRange all = range_of_group(samples, group_size, group);
    float gradient = 0.f;
    for (int part = 0; part < parts; ++part, partial += size) {
      const SampleRange range = range_of_part(all, parts, part);
      if (range.first == range.end) continue;  // nobody wrote there
      gradient = fmaf(*partial, static_cast<float>(range.end - range.first), gradient);
    }
    gradient /= static_cast<float>(all.end - all.first);
    total += gradient;
    total_sq = fmaf(gradient, gradient, total_sq);
  }
  sum[at] += total;
  sum_sq[at] += total_sq;
}

}  // namespace fisherprune::cuda::grad_moments
