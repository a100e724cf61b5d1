// grad_moments: from its contract and plan to launches. Free of torch, so that tests
// can run it unchanged.
#pragma once

#include "grad_moments/cuda/wgmma_launch.cuh"

namespace fisherprune::cuda::grad_moments {

template <class Tile, bool exact>
auto moments_kernel(const GradMoments& m) {
  constexpr Products products = exact ? Products::split : Products::rounded;
  if (both_float32(m)) return grad_moments_kernel<Tile, products, true>;
  if constexpr (exact)
    if (m.input.dtype != Dtype::float32 && m.grad.dtype != Dtype::float32)
      return grad_moments_kernel<Tile, Products::whole, false>;
  return grad_moments_kernel<Tile, products, false>;
}

template <class Tile, bool exact>
void launch_tile(const GradMoments& m, const Shares& shares, float* workspace,
                 Stream stream) {
  const dim3 grid(static_cast<unsigned>(tiles_of<Tile>(m.shape)), shares.splits);
  launch(moments_kernel<Tile, exact>(m), grid, Tile::threads, sizeof(Shared<Tile>),
         stream, task_of<Tile>(m, shares, workspace));
}

template <class Tile, int bits, int stride>
auto window_kernel(Dtype dtype) {
  switch (dtype) {
    case Dtype::float16:
      return grad_moments_window_kernel<Tile, bits, stride, Dtype::float16>;
    case Dtype::bfloat16:
      return grad_moments_window_kernel<Tile, bits, stride, Dtype::bfloat16>;
    default:
      return grad_moments_window_kernel<Tile, bits, stride, Dtype::float32>;
  }
}

template <class Tile, int bits>
auto window_kernel(const Window& window, const ConvShape& s, Dtype dtype) {
  const auto is_usual = [&](int stride) {
    return s.stride_h == stride && s.stride_w == stride &&
           (1 << bits == WINDOW || window.pitch == usual_pitch(1 << bits, stride));
  };
  return is_usual(1)   ? window_kernel<Tile, bits, 1>(dtype)
         : is_usual(2) ? window_kernel<Tile, bits, 2>(dtype)
                       : window_kernel<Tile, bits, 0>(dtype);
}

template <class Tile>
auto window_kernel(const Window& window, const ConvShape& s, Dtype dtype) {
  if (window.column_bits == 1) return window_kernel<Tile, 1, 1>(dtype);
  if (window.column_bits == 2) return window_kernel<Tile, 2>(window, s, dtype);
  if (window.column_bits == 3) return window_kernel<Tile, 3>(window, s, dtype);
  if (window.column_bits == 4) return window_kernel<Tile, 4>(window, s, dtype);
  return window_kernel<Tile, 5>(window, s, dtype);
}

// The rows of the image that some position sees. Where a sample's last unit is not
// full, its window has more rows; these are multiplied by zeros, and must not hold
// infinities.
inline int rows_seen(const ConvShape& s) {
  const int64_t last =
      (s.out_height - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h - s.pad_h;
  return static_cast<int>(std::clamp<int64_t>(last + 1, 0, s.height));
}

template <class Tile>
WindowTask window_task_of(const GradMoments& m, const Window& window,
                          const Shares& shares, float* workspace) {
  WindowTask task{};
  task.window = window;
  task.moments = task_of<Tile>(m, shares, workspace);
  GradMomentsTask& moments = task.moments;
  moments.input.order = Order::positions;  // decides on the order of the weights, too
  moments.input.height = rows_seen(m.shape);
  task.grad_step = Copies<Tile, Dtype::float32>::step * moments.grad_channel;
  task.next_grad = window.units * moments.grad.sample_stride;
  task.next_input = window.units * moments.input.sample_stride;
  task.row_step = moments.input.step_h * window.pitch * WORD;
  return task;
}

template <class Tile>
void launch_window(const GradMoments& m, const Shares& shares, float* workspace,
                   Stream stream) {
  const Window window = find_window<Tile>(m).value();
  const dim3 grid(static_cast<unsigned>(tiles_of<Tile>(m.shape)), shares.splits);
  launch(window_kernel<Tile>(window, m.shape, m.input.dtype), grid, Tile::threads,
         window_memory_bytes<Tile>(window), stream,
         window_task_of<Tile>(m, window, shares, workspace));
}

template <class Tile>
void launch_taps(const GradMoments& m, const Shares& shares, float* workspace,
                 Stream stream) {
  with_image(m, [&](auto image) {
    using Image = decltype(image);
    TapsTask task{};
    task.moments = task_of<Tile>(m, shares, workspace);
    const GradMomentsTask& moments = task.moments;
    choose_bands<Tile, Image>(task, m.shape.positions());
    task.grad_step = Tile::threads / QUADS * moments.grad_channel;
    task.next_grad = static_cast<uint32_t>(Image::units * moments.grad.sample_stride);
    task.next_input = static_cast<uint32_t>(Image::units * moments.input.sample_stride);
    const dim3 grid(static_cast<unsigned>(tiles_of<Tile>(m.shape)), shares.splits);
    launch(grad_moments_taps_kernel<Tile, Image::bits, Image::dtype>, grid,
           Tile::threads, taps_memory_bytes<Tile>(task), stream, task);
  });
}

template <class Tile>
void launch_lanes(const GradMoments& m, const Shares& shares, float* workspace,
                  Stream stream) {
  with_lanes_shape<Tile>(m, [&](auto shape) {
    using Shape = decltype(shape);
    LanesTask task{};
    task.moments = task_of<Tile>(m, shares, workspace);
    task.grad_position = grad_rows(m).column * Shape::value;
    plan_lanes<Tile, Shape>(task, m);
    const dim3 grid(static_cast<unsigned>(tiles_of<Tile>(m.shape)), shares.splits);
    launch(grad_moments_lanes_kernel<Tile, Shape::layout, Shape::stride, Shape::dtype>,
           grid, Tile::threads, lanes_memory_bytes<Shape>(task), stream, task);
  });
}

template <bool exact>
void launch_dense(const GradMoments& m, const Shares& shares, float* workspace,
                  Stream stream) {
  with_dense_shape(m, [&](auto shape) {
    using Shape = decltype(shape);
    const ConvShape& s = m.shape;
    const PositionRows grad = grad_rows(m), input = input_rows(m);
    DenseTask task{};
    task.moments = task_of<DenseTile>(m, shares, workspace);
    task.unit_bits = s.positions() <= 16   ? 4
                     : s.positions() <= 32 ? 5
                                           : Shape::stage_bits;
    task.grad = grad.places(Shape::value);
    task.input = input.places(Shape::value);
    task.grad_vectors = grad.are_vectors(m.grad);
    task.input_vectors = input.are_vectors(m.input);
    const dim3 grid(static_cast<unsigned>(tiles_of<DenseTile>(s)), shares.splits);
    if constexpr (!exact || Shape::value < WORD)
      launch(grad_moments_dense_kernel<DenseTile, Shape::layout, Shape::dtype, exact>,
             grid, DenseTile::threads, dense_memory_bytes<DenseTile, Shape>(), stream,
             task);
  });
}

template <bool exact>
void launch_planned(const GradMoments& m, const GradMomentsPlan& plan, float* workspace,
                    Stream stream) {
  with_tile<exact>(plan.tile, [&](auto tile) {
    using Tile = decltype(tile);
    if constexpr (Tile::path == Path::dense)
      launch_dense<exact>(m, plan.shares, workspace, stream);
    else if constexpr (Tile::path == Path::window)
      launch_window<Tile>(m, plan.shares, workspace, stream);
    else if constexpr (Tile::path == Path::taps)
      launch_taps<Tile>(m, plan.shares, workspace, stream);
    else if constexpr (Tile::path == Path::wgmma)
      launch_wgmma<Tile>(m, plan.shares, workspace, stream);
    else if constexpr (Tile::path == Path::lanes)
      launch_lanes<Tile>(m, plan.shares, workspace, stream);
    else
      launch_tile<Tile, exact>(m, plan.shares, workspace, stream);
  });
}

// Adds what the blocks left in the workspace.
inline void launch_combine(const GradMoments& m, const Shares& shares,
                           const float* workspace, Stream stream) {
  const ConvShape& s = m.shape;
  const int64_t size = s.outputs * s.patch();
  const dim3 grid(static_cast<unsigned>(ceil_div(size, COMBINE_THREADS)));
  if (shares.parts > 1)
    launch(combine_parts, grid, COMBINE_THREADS, 0, stream, workspace, size,
           static_cast<int>(s.samples),
           static_cast<int>(std::min(s.group_size, s.samples)), shares.parts, m.sum,
           m.sum_sq);
  else if (shares.splits > 1)
    launch(combine_moments, grid, COMBINE_THREADS, 0, stream, workspace, size,
           shares.splits, m.sum, m.sum_sq);
}

inline void launch_moments(const GradMoments& m, const GradMomentsPlan& plan,
                           bool allow_tf32, float* workspace, Stream stream) {
  if (allow_tf32)
    launch_planned<false>(m, plan, workspace, stream);
  else
    launch_planned<true>(m, plan, workspace, stream);
  launch_combine(m, plan.shares, workspace, stream);
}

// Enqueues the op on `stream`; `workspace` holds plan.workspace floats.
inline void run_grad_moments(const GradMoments& m, const GradMomentsPlan& plan,
                             bool allow_tf32, float* workspace, Stream stream) {
  if (plan.pixels)
    return launch_moments(copied_to_pixels(m, workspace, stream), plan, allow_tf32,
                          workspace + pixel_floats(m.shape), stream);
  if (!plan.products) return launch_moments(m, plan, allow_tf32, workspace, stream);
  for (const GradMoments& part : {m, squares_of(m, workspace, stream)})
    launch_moments(samples_as_positions(part), plan, allow_tf32, nullptr, stream);
}

// Whether there is anything to add.
inline bool has_work(const ConvShape& s) {
  return s.samples > 0 && s.positions() > 0 && s.outputs > 0 && s.patch() > 0;
}

}  // namespace fisherprune::cuda::grad_moments
