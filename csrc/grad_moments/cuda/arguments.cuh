// What all kernels of grad_moments are told, and the order of their loads, from the
// contract and the plan.
#pragma once

#include "grad_moments/cuda/plan.cuh"

namespace fisherprune::cuda::grad_moments {

inline Order choose_order(const GradMoments& m, const View4& v, bool plain,
                          int64_t step) {
  const ConvShape& s = m.shape;
  if (both_float32(m) && plain && s.positions() > SLAB / 2 &&
      rows_are_vectors(v, s.out_height, s.out_width))
    return Order::vectors;
  const int64_t next = s.out_width > 1 ? v.stride[3] * step : v.stride[2] * step;
  return s.positions() == 1 || v.stride[1] < next ? Order::rows : Order::positions;
}

inline Operand operand_of(const View4& v, Order order, int64_t height, int64_t width) {
  Operand op{};
  op.data = static_cast<const char*>(v.data);
  op.dtype = v.dtype;
  op.order = order;
  op.sample_stride = v.stride[0] * size_of(v.dtype);
  op.stride_h = v.stride[2] * size_of(v.dtype);
  op.stride_w = v.stride[3] * size_of(v.dtype);
  op.height = static_cast<int>(height);
  op.width = static_cast<int>(width);
  op.step_h = op.step_w = 1;
  return op;
}

inline Operand grad_operand(const GradMoments& m) {
  return operand_of(m.grad, choose_order(m, m.grad, true, 1), m.shape.out_height,
                    m.shape.out_width);
}

inline Operand input_operand(const GradMoments& m) {
  const ConvShape& s = m.shape;
  const int64_t step = s.out_width > 1 ? s.stride_w : s.stride_h;
  Operand op = operand_of(m.input, choose_order(m, m.input, is_pointwise(s), step),
                          s.height, s.width);
  op.step_h = static_cast<int>(s.stride_h);
  op.step_w = static_cast<int>(s.stride_w);
  op.pad_h = static_cast<int>(s.pad_h);
  op.pad_w = static_cast<int>(s.pad_w);
  return op;
}

template <class Tile>
GradMomentsTask task_of(const GradMoments& m, const Shares& shares, float* workspace) {
  const ConvShape& s = m.shape;
  GradMomentsTask task{};
  task.grad = grad_operand(m);
  task.input = input_operand(m);
  task.grad_channel = m.grad.stride[1] * size_of(m.grad.dtype);
  task.input_channel = m.input.stride[1] * size_of(m.input.dtype);
  task.width_divider = Divider(static_cast<uint32_t>(s.out_width));
  task.out_width = static_cast<int>(s.out_width);
  task.positions = static_cast<int>(s.positions());
  task.rows = static_cast<int>(s.group_outputs());
  task.columns = static_cast<int>(s.patch());
  task.kernel_h = static_cast<int>(s.kernel_h);
  task.kernel_w = static_cast<int>(s.kernel_w);
  task.dilation_h = static_cast<int>(s.dilation_h);
  task.dilation_w = static_cast<int>(s.dilation_w);
  task.row_tiles = static_cast<int>(ceil_div(s.group_outputs(), Tile::rows));
  task.column_tiles = static_cast<int>(ceil_div(s.patch(), Tile::columns));
  task.samples = static_cast<int>(s.samples);
  task.group_size = static_cast<int>(std::min(s.group_size, s.samples));
  const int64_t size = s.outputs * s.patch();
  task.parts = shares.parts;
  task.fresh = shares.splits > 1;
  task.sum = task.fresh ? workspace : m.sum;
  task.sum_sq = task.fresh ? workspace + size : m.sum_sq;
  if (task.parts > 1) task.sum_sq = nullptr;
  task.split_stride = task.parts > 1 ? size : 2 * size;
  return task;
}

}  // namespace fisherprune::cuda::grad_moments
