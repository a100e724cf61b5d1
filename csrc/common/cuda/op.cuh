// What every op body on CUDA needs of torch: the device, its current stream, workspace.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/cuda/launch.cuh"

namespace fisherprune::cuda {

using torch::stable::accelerator::DeviceGuard;

inline Stream current_stream(const torch::stable::Tensor& on) {
  void* stream = nullptr;
  const AOTITorchError error =
      aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream);
  check(error == AOTI_TORCH_SUCCESS, "fisherprune: torch has no current stream");
  return static_cast<Stream>(stream);
}

}  // namespace fisherprune::cuda
