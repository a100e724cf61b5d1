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

#include "grad_moments/cuda/flush.cuh"

namespace fisherprune::cuda::grad_moments {

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

// Samples of the open group and groups since the last flush; and, in one register with
// these, whether there was none.
struct GroupCount {
  static constexpr unsigned fresh = 1u << 31;
  int samples = 0;
  unsigned since;

  __device__ explicit GroupCount(bool is_fresh) : since(is_fresh ? fresh : 0) {}
  __device__ bool is_fresh() const { return since >= fresh; }
  __device__ unsigned groups() const { return since & (fresh - 1); }
};

// After a sample: closes its group where it was the group's last.
template <class Tile>
__device__ inline void close_sample(Moments<Tile>& moments, const GradMomentsTask& task,
                                    GroupCount& count, bool last) {
  if (++count.samples < task.group_size && !last) return;
  close_group<Tile>(moments, count.samples, task.group_size);
  count.samples = 0;
  ++count.since;
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

// The pipeline of all kernels: load(stage, lead) starts the copies of what comes `lead`
// stages behind the cursor, and multiply(stage) works on what has landed, until
// `cursor` has passed the range. With `ahead`, prepare(stage) comes in between, one
// stage early: each thread may change what it has copied. Now and then, between two
// stages, the sums are flushed; that has a loop of its own, because otherwise the
// compiler would move registers to and fro in each stage. A stage holds up to `samples`
// samples, or a part of one.
template <class Tile, int samples, int ahead, class Load, class Prepare, class Multiply>
__device__ inline void run_pipeline(Moments<Tile>& moments, const GradMomentsTask& task,
                                    GroupCount& count, const SampleRange& range,
                                    const Cursor& cursor, Load load, Prepare prepare,
                                    Multiply multiply) {
  constexpr int stages = Tile::stages;
  static_assert(stages >= 2 + ahead);
  static_assert(STAGE_SAMPLES % samples == 0, "see FLUSH_GROUPS");
  const auto behind = [](int stage) { return stage + 1 < stages ? stage + 1 : 0; };
  int stage = 1 - stages;  // below 0 while the pipeline is filled
  while (cursor.sample < range.end) {
    do {
      const bool landed = stage >= -ahead;
      if (landed) {
        await_copies<stages - 2 - ahead>();
        // Everybody's copies have landed, and nobody reads the stage before this one.
        __syncthreads();
      }
      load(stage > 0 ? stage - 1 : stage + stages - 1,
           stage > 0 ? stages - 1 : stage + stages - 1);
      commit_copies();
      if (ahead && landed) prepare(behind(stage));
      if (stage >= 0) multiply(stage);
      stage = behind(stage);
    } while (cursor.sample < range.end && count.groups() < FLUSH_GROUPS);
    flush<Tile>(moments, task, count.is_fresh());
    count.since = 0;
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
  GroupCount count(task.fresh);
  run_pipeline<Tile, 2 * Tile::slabs, 0>(  // two short samples in each slab
      moments, task, count, range, cursor,
      [&](int stage, int) {
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
