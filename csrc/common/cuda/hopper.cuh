// What multiprocessors of sm_90a do by themselves while threads go on: copies of boxes
// out of tensors (TMA), products of a warpgroup's matrices in shared memory (wgmma),
// and the barriers in shared memory that say when. The emulator has its own versions.
#pragma once

#include "common/cuda/ptx.cuh"

namespace fisherprune::cuda {

// A tensor of float32 in four dimensions, neighbours in the first one, and the box that
// a copy takes. The box lies in shared memory without gaps, rounded to TF32; entries
// outside of the tensor become zeros. Its rows have 16, 32, 64 or 128 bytes. In eight
// rows of more than 16 bytes, those pieces are permuted as matrix_at expects it.
struct Boxes {
  const void* data;
  int64_t sizes[4];
  int64_t strides[3];  // in bytes, from the second dimension on
  int box[4];

  int row_bytes() const { return box[0] * static_cast<int>(sizeof(float)); }
};

// A matrix in shared memory for `multiply_matrices`, in the 64 bits of the PTX ISA's
// "Matrix Descriptor Format". It consists of pieces of 16 bytes, which hold four of
// its inner index. Eight rows have their pieces `row_bytes` apart; the next eight rows
// follow `rows_apart` bytes behind. The next pieces of a row are its neighbours; where
// row_bytes is 16, they lie `pieces_apart`. `address`: a multiple of 16; where rows
// have more pieces, its eight rows begin at a multiple of their size.
__host__ __device__ constexpr uint64_t matrix_at(uint32_t address, int row_bytes,
                                                 int rows_apart, int pieces_apart) {
  const auto field = [](uint32_t bytes) { return uint64_t{bytes >> 4 & 0x3fff}; };
  const uint64_t permuted = row_bytes == 128  ? 1
                            : row_bytes == 64 ? 2
                            : row_bytes == 32 ? 3
                                              : 0;
  return field(address) | field(static_cast<uint32_t>(pieces_apart)) << 16 |
         field(static_cast<uint32_t>(rows_apart)) << 32 | permuted << 62;
}

// The matrix that begins some bytes further on.
__host__ __device__ constexpr uint64_t moved(uint64_t matrix, int bytes) {
  return matrix + static_cast<uint64_t>(bytes / 16);
}

constexpr int PRODUCT_ROWS = 64, PRODUCT_COLUMNS = 144, PRODUCT_DEPTH = 8;

// What a lane holds of a product's 64 x 144 results: of blocks of eight columns, the
// entries of multiply_tf32's c, for its warp's 16 rows.
using Results = float[PRODUCT_COLUMNS / 8][4];

}  // namespace fisherprune::cuda

#ifndef __CUDACC__
#include <hopper.h>
#else

#include <cuda.h>

namespace fisherprune::cuda {

using TensorMap = CUtensorMap;

// Of the driver, which is asked for at run time: nothing is linked to it.
inline decltype(&cuTensorMapEncodeTiled) find_encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found,
                                                    cudaEnableDefault, &result);
#endif
  check_cuda(error, "cuTensorMapEncodeTiled");
  check(result == cudaDriverEntryPointSuccess && found,
        "fisherprune: the CUDA driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

// TMA rounds what it copies to the nearest TF32 where that is the type of the map.
inline TensorMap tensor_map(const Boxes& of) {
  static const auto encode = find_encoder();
  cuuint64_t sizes[4], strides[3];
  cuuint32_t box[4], steps[4];
  for (int i = 0; i < 4; ++i) {
    sizes[i] = static_cast<cuuint64_t>(of.sizes[i]);
    box[i] = static_cast<cuuint32_t>(of.box[i]);
    steps[i] = 1;
    if (i < 3) strides[i] = static_cast<cuuint64_t>(of.strides[i]);
  }
  const CUtensorMapSwizzle permuted = of.row_bytes() == 128 ? CU_TENSOR_MAP_SWIZZLE_128B
                                      : of.row_bytes() == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                      : of.row_bytes() == 32
                                          ? CU_TENSOR_MAP_SWIZZLE_32B
                                          : CU_TENSOR_MAP_SWIZZLE_NONE;
  TensorMap map;
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_TFLOAT32, 4, const_cast<void*>(of.data),
             sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, permuted,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(result == CUDA_SUCCESS, "fisherprune: cuTensorMapEncodeTiled failed with ",
        static_cast<int>(result));
  return map;
}

__device__ inline uint32_t shared_bytes_at(SharedAddress address) { return address; }

__device__ inline int cluster_size() {
  int size;
  asm volatile("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
  return size;
}

__device__ inline int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctaid.x;" : "=r"(rank));
  return rank;
}

// True for one lane of the warp. All lanes must call it. The compiler knows that there
// is one, and keeps what it computes in registers that a warp shares.
__device__ inline bool is_elected() {
  uint32_t elected;
  asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}"
               : "=r"(elected));
  return elected;
}

// Waits for all threads of the cluster.
__device__ inline void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::
                   : "memory");
}

// A barrier takes 8 bytes. One of its phases ends when `arrivals` threads have arrived
// and the bytes have landed that they expected.
__device__ inline void init_barrier(SharedAddress barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals)
               : "memory");
}

// After the last init_barrier and before threads meet: copies see the barriers.
__device__ inline void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives at another block's barrier, of the cluster, at the same place.
__device__ inline void arrive_in(int rank, SharedAddress barrier) {
  asm volatile(
      "{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
      "mbarrier.arrive.shared::cluster.b64 _, [there];}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

__device__ inline void arrive_expecting(SharedAddress barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
               "r"(bytes)
               : "memory");
}

// Waits until the barrier's phase of this parity has ended: 0 for its first one. Of a
// new barrier, the phase before the first one has parity 1 and has ended.
__device__ inline void await_phase(SharedAddress barrier, unsigned parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{.reg .pred p; "
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
        "selp.u32 %0, 1, 0, p;}"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!ended);
}

// Starts a copy of the box that begins at (x, y, z, w), by one thread. The barrier gets
// all of the box's bytes, also for entries outside of the tensor.
__device__ inline void copy_box(SharedAddress to, const TensorMap& from,
                                SharedAddress barrier, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(&from), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

// The same for all blocks of the cluster: to the same place, with the same barrier.
__device__ inline void copy_box_to_all(SharedAddress to, const TensorMap& from,
                                       SharedAddress barrier, int x, int y, int z,
                                       int w) {
  const uint16_t all = static_cast<uint16_t>((1 << cluster_size()) - 1);
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
      "l"(&from), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w), "h"(all)
      : "memory");
}

// All warps of a warpgroup change how many registers a thread may have.
template <int registers>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

template <int registers>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

// The results pass through each instruction, or the compiler would move what is done
// with them to where products are still under way.
#define FISHERPRUNE_OF(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define FISHERPRUNE_RESULTS                                                           \
  FISHERPRUNE_OF(0), FISHERPRUNE_OF(1), FISHERPRUNE_OF(2), FISHERPRUNE_OF(3),         \
      FISHERPRUNE_OF(4), FISHERPRUNE_OF(5), FISHERPRUNE_OF(6), FISHERPRUNE_OF(7),     \
      FISHERPRUNE_OF(8), FISHERPRUNE_OF(9), FISHERPRUNE_OF(10), FISHERPRUNE_OF(11),   \
      FISHERPRUNE_OF(12), FISHERPRUNE_OF(13), FISHERPRUNE_OF(14), FISHERPRUNE_OF(15), \
      FISHERPRUNE_OF(16), FISHERPRUNE_OF(17)

// Before products of a warpgroup, after everything that was done with the results.
__device__ inline void begin_products(Results& c) {
  asm volatile("wgmma.fence.sync.aligned;" : FISHERPRUNE_RESULTS::"memory");
}

// c (64 x 144) = a (64 x 8) b (8 x 144), or c += where `adds`: starts a product of the
// whole warpgroup. Both matrices lie in shared memory, b transposed; of their float32
// the upper 19 bits count. Nobody may read or write c before await_products.
__device__ inline void multiply_matrices(Results& c, uint64_t a, uint64_t b,
                                         bool adds) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %74, 0; "
      "wgmma.mma_async.sync.aligned.m64n144k8.f32.tf32.tf32 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, "
      "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, "
      "%33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, "
      "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, "
      "%65, %66, %67, %68, %69, %70, %71}, %72, %73, p, 1, 1;}"
      : FISHERPRUNE_RESULTS
      : "l"(a), "l"(b), "r"(static_cast<uint32_t>(adds)));
}

// Waits for the products that were started.
__device__ inline void await_products(Results& c) {
  asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
               : FISHERPRUNE_RESULTS::"memory");
}

#undef FISHERPRUNE_RESULTS
#undef FISHERPRUNE_OF

}  // namespace fisherprune::cuda

#endif  // __CUDACC__
