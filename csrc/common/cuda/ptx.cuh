// The PTX instructions without a C++ name. The emulator has its own versions.
#pragma once

#include "common/cuda/launch.cuh"

#ifdef __CUDACC__

namespace fisherprune::cuda {

// Where something lies in shared memory: a number of 32 bits to which bytes are added.
// Of a pointer the compiler finds the same number anew wherever it is used.
using SharedAddress = uint32_t;

__device__ inline SharedAddress shared_address(void* pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

// The same number, kept in a register: by way of a lane's own shuffle, behind which the
// compiler can't look. It would otherwise repeat the arithmetic wherever the number is
// used. For whole warps.
__device__ inline int kept(int value) {
  return __shfl_sync(0xffffffffu, value, static_cast<int>(threadIdx.x % 32));
}

__device__ inline float load_shared(SharedAddress from) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(from) : "memory");
  return value;
}

__device__ inline void load_shared(uint32_t (&words)[2], SharedAddress from) {
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
               : "=r"(words[0]), "=r"(words[1])
               : "r"(from)
               : "memory");
}

__device__ inline void load_shared(uint32_t (&words)[4], SharedAddress from) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(from)
               : "memory");
}

__device__ inline void store_shared(SharedAddress to, const uint32_t (&words)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// Starts a copy of 4 bytes to shared memory, or of zeros; its end is awaited below.
__device__ inline void copy4_async(float* shared, const float* global, bool inside) {
  asm volatile(
      "cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)),
      "l"(global), "r"(inside ? 4 : 0)
      : "memory");
}

// 8 bytes, or zeros.
__device__ inline void copy8_async(SharedAddress shared, const char* global,
                                   bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared),
               "l"(global), "r"(inside ? 8 : 0)
               : "memory");
}

// 16 bytes, of which the first `bytes` are read and the others are zeros.
__device__ inline void copy16_async(SharedAddress shared, const char* global,
                                    int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared),
               "l"(global), "r"(bytes)
               : "memory");
}

// The bits of a value of 2 or 4 bytes, or zeros: without a branch, so that loads which
// follow each other are under way together.
template <int bytes>
__device__ inline uint32_t load_if(const char* global, bool inside) {
  uint32_t bits = 0;
  if constexpr (bytes == 2)
    asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p ld.global.u16 %0, [%1];}"
                 : "+r"(bits)
                 : "l"(global), "r"(static_cast<uint32_t>(inside)));
  else
    asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p ld.global.u32 %0, [%1];}"
                 : "+r"(bits)
                 : "l"(global), "r"(static_cast<uint32_t>(inside)));
  return bits;
}

// Closes a group of this thread's copies.
__device__ inline void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until at most `newest` of this thread's groups are still under way.
template <int newest>
__device__ inline void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory");
}

// Nearest tf32 in the first 19 bits; the others hold anything. Ties go to even where
// that is one instruction, away from zero where it would be three.
__device__ inline uint32_t to_tf32(float value) {
  uint32_t bits;
#if __CUDA_ARCH__ >= 900
  asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
#else
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
#endif
  return bits;
}

// Reads four 8 x 4 matrices of words: lanes 8 e to 8 e + 7 give the rows of matrix e,
// each 16 bytes, of which lane l gets (l / 4, l % 4) as words[e].
__device__ inline void read_matrices(uint32_t (&words)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row)
               : "memory");
}

// Reads four 8 x 8 matrices of 16 bits: lanes 8 e to 8 e + 7 give the rows of matrix e,
// each 16 bytes; lane l gets its column l / 4 in rows 2 (l % 4) and one more, as
// words[e].
__device__ inline void read_transposed(uint32_t (&words)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row)
               : "memory");
}

__device__ inline float half_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// c (16 x 8) += a (16 x 8) b (8 x 8), a warp's product. With r = lane / 4 and
// i = lane % 4, a lane's a holds (r, i), (r + 8, i), (r, i + 4), (r + 8, i + 4); its b
// holds (i, r), (i + 4, r); its c (r, 2 i), (r, 2 i + 1), (r + 8, 2 i), (r + 8, 2 i +
// 1). Volatile, so that no compiler moves it to where only part of the warp goes.
__device__ inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c (16 x 8) += a (16 x 16) b (16 x 8), of 16 bits, two a word. With r and i as above a
// lane's a holds (r, 2 i) and (r, 2 i + 1), the same 8 rows below, both 8 columns on;
// its b holds (2 i, r) and (2 i + 1, r), and 8 rows below.
__device__ inline void multiply_float16(float (&c)[4], const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void multiply_bfloat16(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Of TF32 and half the depth, a (16 x 4) b (4 x 8): of a lane's a and b the first half.
__device__ inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[2],
                                     const uint32_t (&b)[1]) {
  asm volatile(
      "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}

}  // namespace fisherprune::cuda

#endif  // __CUDACC__
