// Launches of products of warpgroups: where their copies find the operands.
#pragma once

#include "grad_moments/cuda/arguments.cuh"

namespace fisherprune::cuda::grad_moments {

// The gradient's positions as runs, and the images with a row's channels together.
template <class Tile, class Image>
WgmmaTask wgmma_task_of(const GradMoments& m, const Shares& shares, float* workspace) {
  const ConvShape& s = m.shape;
  const GradMomentsTask moments = task_of<Tile>(m, shares, workspace);
  const Operand &grad = moments.grad, &input = moments.input;
  const int64_t runs = s.positions() / Image::run;
  return {tensor_map({grad.data,
                      {Image::run, s.outputs, runs, s.samples},
                      {moments.grad_channel, Image::run * WORD, grad.sample_stride},
                      {Image::run, GRAD_ROWS, 1, 1}}),
          tensor_map({input.data,
                      {Image::width, s.channels, s.height, s.samples},
                      {moments.input_channel, Image::row, input.sample_stride},
                      {Image::width, Image::channels, 1, 1}}),
          moments};
}

template <class Tile>
void launch_wgmma(const GradMoments& m, const Shares& shares, float* workspace,
                  Stream stream) {
  with_wgmma_image(m.shape.width, [&](auto image) {
    using Image = decltype(image);
    const WgmmaTask task = wgmma_task_of<Tile, Image>(m, shares, workspace);
    int blocks = WGMMA_CLUSTER;  // with the same rows
    while (task.moments.column_tiles % blocks != 0) blocks /= 2;
    const dim3 grid(static_cast<unsigned>(tiles_of<Tile>(m.shape)), shares.splits);
    launch_clusters(grad_moments_wgmma_kernel<Tile, Image::bits>, blocks, grid,
                    Tile::threads + WGMMA_COPYING, WgmmaMemory<Tile, Image>::bytes,
                    stream, task);
  });
}

}  // namespace fisherprune::cuda::grad_moments
