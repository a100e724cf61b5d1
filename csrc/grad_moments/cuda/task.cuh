// What all kernels of grad_moments are told, and where a block's tile lies.
#pragma once

#include "grad_moments/cuda/load.cuh"

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

}  // namespace fisherprune::cuda::grad_moments
