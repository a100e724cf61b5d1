// What the kernels need of CUDA besides the language: launches and shared memory. Where
// the compiler is not nvcc, the emulator of the tests takes the place of CUDA.
#pragma once

#ifndef __CUDACC__
#include <emulator.h>
#else

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "common/check.h"

namespace fisherprune::cuda {

using Stream = cudaStream_t;

inline void check_cuda(cudaError_t error, const char* what) {
  // CUDA keeps the last error, and the next caller would report it as its own.
  if (error != cudaSuccess) cudaGetLastError();
  check(error == cudaSuccess, "fisherprune: ", what, ": ", cudaGetErrorString(error));
}

// Of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "current device");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device),
             "attribute of a device");
  return value;
}

inline int multiprocessors() {
  return device_attribute(cudaDevAttrMultiProcessorCount);
}

// Shared memory that one block may have.
inline size_t most_shared_bytes() {
  return static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
}

// Clusters of `size` neighbouring blocks, which run at the same time. Safe under stream
// capture: nothing here waits, copies or allocates.
template <class... Params, class... Args>
void launch_clusters(void (*kernel)(Params...), int size, dim3 grid, int threads,
                     size_t shared_bytes, Stream stream, const Args&... args) {
  constexpr size_t always_granted = 48 << 10;
  if (shared_bytes > always_granted)  // host threads may race: all set the same limit
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(most_shared_bytes())),
               "shared memory of a kernel");
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(size);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = size > 1 ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, Params(args)...),
             "launch of a kernel");
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes,
            Stream stream, const Args&... args) {
  launch_clusters(kernel, 1, grid, threads, shared_bytes, stream, args...);
}

__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char fisherprune_shared[];
  return fisherprune_shared;
}

}  // namespace fisherprune::cuda

#endif  // __CUDACC__
