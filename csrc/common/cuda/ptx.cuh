// The PTX instructions without a C++ name. The emulator has its own versions.
#pragma once

#include "common/cuda/launch.cuh"

#ifdef __CUDACC__

namespace fisherprune::cuda {

// Where something lies in shared memory: a 32-bit number, to which bytes may be added.
// From a pointer the compiler would compute this number again at each use.
using SharedAddress = uint32_t;

__device__ inline SharedAddress shared_address(void* pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

// Changes some of the address's lower bits, below the alignment of shared memory.
__device__ inline SharedAddress flipped(SharedAddress address, int bits) {
  return address ^ static_cast<SharedAddress>(bits);
}

// Returns the value, and makes the compiler keep it in a register. Otherwise the
// compiler would repeat the arithmetic at each use. Each lane shuffles with itself, and
// the compiler cannot see through a shuffle. All lanes of a warp must call it.
__device__ inline int kept(int value) {
  return __shfl_sync(0xffffffffu, value, static_cast<int>(threadIdx.x % 32));
}

// threadIdx.x, read where this is called: what is computed from it takes no register
// before.
__device__ inline int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
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

// Starts a copy of 4 bytes to shared memory, or of zeros where not `inside`.
// await_copies waits for its end.
__device__ inline void copy4_async(SharedAddress shared, const char* global,
                                   bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared),
               "l"(global), "r"(inside ? 4 : 0)
               : "memory");
}

__device__ inline void copy4_async(float* shared, const float* global, bool inside) {
  copy4_async(shared_address(shared), reinterpret_cast<const char*>(global), inside);
}

// The same for 8 bytes.
__device__ inline void copy8_async(SharedAddress shared, const char* global,
                                   bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared),
               "l"(global), "r"(inside ? 8 : 0)
               : "memory");
}

// The same for 16 bytes: the first `bytes` are read, the others become zeros.
__device__ inline void copy16_async(SharedAddress shared, const char* global,
                                    int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared),
               "l"(global), "r"(bytes)
               : "memory");
}

// Returns the bits of a value of 2 or 4 bytes, or zeros where not `inside`. It has no
// branch, so loads that follow each other are in flight together.
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

// Waits until at most `newest` of this thread's groups are still in flight.
template <int newest>
__device__ inline void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory");
}

// Returns the nearest TF32 in the upper 19 bits; the lower bits hold anything. Ties go
// to even where that takes one instruction. Elsewhere it would take three, and ties go
// away from zero.
__device__ inline uint32_t to_tf32(float value) {
  uint32_t bits;
#if __CUDA_ARCH__ >= 900
  asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
#else
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
#endif
  return bits;
}

// Reads four 8 x 4 matrices of words. Lanes 8 e to 8 e + 7 give the addresses of the
// rows of matrix e, 16 bytes each; lane l gets its entry (l / 4, l % 4) as words[e].
__device__ inline void read_matrices(uint32_t (&words)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row)
               : "memory");
}

// Reads four 8 x 8 matrices of 16-bit numbers. Lanes 8 e to 8 e + 7 give the addresses
// of the rows of matrix e, 16 bytes each; lane l gets its column l / 4, of that rows
// 2 (l % 4) and 2 (l % 4) + 1, as words[e].
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

// c (16 x 8) += a (16 x 8) b (8 x 8), a product of the whole warp. With r = lane / 4
// and i = lane % 4, a lane's a holds (r, i), (r + 8, i), (r, i + 4), (r + 8, i + 4);
// its b holds (i, r), (i + 4, r); its c holds (r, 2 i), (r, 2 i + 1), (r + 8, 2 i), (r
// + 8, 2 i + 1). It is volatile: otherwise the compiler might move it into a branch
// that only a part of the warp takes.
__device__ inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c (16 x 8) += a (16 x 16) b (16 x 8) of 16-bit numbers, two in each word. With r and
// i as above, the words of a lane's a hold columns 2 i and 2 i + 1 of row r, of row r +
// 8, then the same 8 columns further; the words of its b hold rows 2 i and 2 i + 1 of
// column r, then 8 rows further.
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

// In TF32, half as deep: c (16 x 8) += a (16 x 4) b (4 x 8). A lane's a and b are the
// first half of those above.
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
