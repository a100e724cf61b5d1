// Runs CUDA kernels on the CPU, as the compiler's input and not as a re-telling: the
// kernels' headers include this file where the compiler is not nvcc.
//
// A block's threads are fibers. Between two points where they must meet (__syncthreads,
// a warp's collective) they run one after the other in an order drawn from a seed, each
// until it waits; so what needs a barrier and has none goes wrong soon. Blocks run one
// after the other, in such an order too; those of a cluster run together. What hardware
// leaves open is made to hurt: shared memory starts as NaN; the target of an
// asynchronous copy becomes NaN when the copy starts and right only when its thread
// awaits it; tensor cores cut off sums. Arrays are separate allocations, shared memory
// is one per block, so the address sanitizer sees accesses beyond their ends. Threads
// that wait for each other in vain end the program.
#pragma once

#include <cmath>

#include "banks.h"
#include "scheduler.h"

#define __global__
#define __grid_constant__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(4) uchar4 {
  unsigned char x, y, z, w;
};
inline uchar4 make_uchar4(unsigned char x, unsigned char y, unsigned char z,
                          unsigned char w) {
  return {x, y, z, w};
}

// ---- the language ----

inline void __syncthreads() { emulator::wait_as(emulator::State::at_barrier); }

inline void __syncwarp() { emulator::show(1, 0); }

inline unsigned __ballot_sync(unsigned lanes, bool vote) {
  emulator::require_full(lanes);
  emulator::show(2, vote);
  unsigned all = 0;
  for (unsigned i = 0; i < 32; ++i)
    all |= static_cast<unsigned>(emulator::shown<bool>(i)) << i;
  return all;
}

inline unsigned __match_any_sync(unsigned lanes, unsigned value) {
  emulator::require_full(lanes);
  emulator::show(3, value);
  unsigned same = 0;
  for (unsigned i = 0; i < 32; ++i)
    same |= static_cast<unsigned>(emulator::shown<unsigned>(i) == value) << i;
  return same;
}

template <class Value>
Value __shfl_up_sync(unsigned lanes, Value value, unsigned distance) {
  emulator::require_full(lanes);
  emulator::show(4, value);
  const unsigned lane = emulator::block->current % 32;
  return emulator::shown<Value>(lane < distance ? lane : lane - distance);
}

inline unsigned __reduce_add_sync(unsigned lanes, unsigned value) {
  emulator::require_full(lanes);
  emulator::show(8, value);
  unsigned sum = 0;
  for (unsigned i = 0; i < 32; ++i) sum += emulator::shown<unsigned>(i);
  return sum;
}

inline void __threadfence() {}  // what a block wrote is there for those that follow

template <class Value>
Value __ldg(const Value* from) {
  return *from;
}

template <class Value>
Value __ldcg(const Value* from) {
  return *from;
}

template <class Value>
void __stcs(Value* to, Value value) {
  *to = value;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }

template <class Value>
Value atomicAdd(Value* at, Value more) {
  const Value before = *at;
  *at = before + more;
  return before;
}

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

namespace fisherprune::cuda {

// ---- what launch.cuh gives ----

using Stream = void*;

inline int multiprocessors() { return emulator::multiprocessor_count; }

inline size_t most_shared_bytes() { return 227 << 10; }

template <class... Params, class... Args>
void launch_clusters(void (*kernel)(Params...), int size, dim3 grid, int threads,
                     size_t shared_bytes, Stream, const Args&... args) {
  emulator::run_grid(
      grid, static_cast<unsigned>(size), static_cast<unsigned>(threads), shared_bytes,
      [=] { kernel(args...); }, emulator::count_cycles);
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes,
            Stream stream, const Args&... args) {
  launch_clusters(kernel, 1, grid, threads, shared_bytes, stream, args...);
}

inline unsigned char* dynamic_shared() { return emulator::block->shared.get(); }

// ---- what ptx.cuh gives ----

// A pointer, so that the address sanitizer sees what is read there.
using SharedAddress = char*;

inline SharedAddress shared_address(void* pointer) {
  return static_cast<SharedAddress>(pointer);
}

inline SharedAddress flipped(SharedAddress address, int bits) {
  char* shared = reinterpret_cast<char*>(dynamic_shared());
  return shared + ((address - shared) ^ bits);
}

inline int kept(int value) { return value; }

inline int thread_index() { return static_cast<int>(threadIdx.x); }

inline float load_shared(SharedAddress from) {
  emulator::note_access(emulator::Access::read, from, 4);
  return *reinterpret_cast<const float*>(from);
}

template <size_t words>
void load_shared(uint32_t (&to)[words], SharedAddress from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof to)
    emulator::fail("load_shared: the address must be a multiple of the size");
  emulator::note_access(emulator::Access::read, from, sizeof to);
  std::memcpy(to, from, sizeof to);
}

inline void store_shared(SharedAddress to, const uint32_t (&words)[4]) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof words)
    emulator::fail("store_shared: the address must be a multiple of the size");
  emulator::note_access(emulator::Access::write, to, sizeof words);
  std::memcpy(to, words, sizeof words);
}

inline void start_copy(const emulator::Copy& copy) {
  emulator::note_access(emulator::Access::copy, copy.to, copy.size);
  emulator::start_copy(copy);
}

inline void copy4_async(float* shared, const float* global, bool inside) {
  start_copy({shared, global, 4, inside ? 4 : 0});
}

inline void copy4_async(SharedAddress shared, const char* global, bool inside) {
  if (reinterpret_cast<uintptr_t>(shared) % 4 ||
      reinterpret_cast<uintptr_t>(global) % 4)
    emulator::fail("copy4_async: addresses must be multiples of 4");
  start_copy({shared, global, 4, inside ? 4 : 0});
}

inline void copy8_async(SharedAddress shared, const char* global, bool inside) {
  if (reinterpret_cast<uintptr_t>(shared) % 8 ||
      reinterpret_cast<uintptr_t>(global) % 8)
    emulator::fail("copy8_async: addresses must be multiples of 8");
  start_copy({shared, global, 8, inside ? 8 : 0});
}

inline void copy16_async(SharedAddress shared, const char* global, int bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 ||
      reinterpret_cast<uintptr_t>(global) % 16)
    emulator::fail("copy16_async: addresses must be multiples of 16");
  start_copy({shared, global, 16, bytes});
}

template <int bytes>
uint32_t load_if(const char* global, bool inside) {
  uint32_t bits = 0;
  if (inside && bytes == 2) bits = *reinterpret_cast<const uint16_t*>(global);
  if (inside && bytes == 4) bits = *reinterpret_cast<const uint32_t*>(global);
  return bits;
}

inline void commit_copies() {
  ++emulator::self().commits;
  emulator::self().committed.push_back(std::move(emulator::self().open));
  emulator::self().open.clear();
}

template <int newest>
void await_copies() {
  auto& committed = emulator::self().committed;
  for (; committed.size() > newest; committed.erase(committed.begin()))
    for (const emulator::Copy& copy : committed.front()) emulator::finish_copy(copy);
}

// As ptxas makes it: what rounding leaves in the last 13 bits stays there.
inline uint32_t to_tf32(float value) {
  const uint32_t bits = __float_as_uint(value);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : bits + 0x1000u;
}

inline float half_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float sign = bits & 0x8000 ? -1.f : 1.f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024.f + fraction, exponent - 25)
                          : std::ldexp(static_cast<float>(fraction), -24));
}

inline void read_matrices(uint32_t (&words)[4], SharedAddress row) {
  if (reinterpret_cast<uintptr_t>(row) % 16)
    emulator::fail("read_matrices: addresses must be multiples of 16");
  emulator::note_access(emulator::Access::matrices, row, 16);
  emulator::show(7, row);
  const unsigned lane = emulator::block->current % 32;
  for (unsigned e = 0; e < 4; ++e)
    std::memcpy(&words[e],
                emulator::shown<SharedAddress>(8 * e + lane / 4) + lane % 4 * 4, 4);
}

inline void read_transposed(uint32_t (&words)[4], SharedAddress row) {
  if (reinterpret_cast<uintptr_t>(row) % 16)
    emulator::fail("read_transposed: addresses must be multiples of 16");
  emulator::note_access(emulator::Access::matrices, row, 16);
  emulator::show(9, row);
  const unsigned lane = emulator::block->current % 32;
  for (unsigned e = 0; e < 4; ++e) {
    words[e] = 0;
    for (unsigned half = 0; half < 2; ++half) {
      const auto from =
          emulator::shown<SharedAddress>(8 * e + lane % 4 * 2 + half) + lane / 4 * 2;
      words[e] |= uint32_t{*reinterpret_cast<const uint16_t*>(from)} << 16 * half;
    }
  }
}

// Toward zero, as tensor cores do where they add.
inline float cut_to_float(double value) {
  const float nearest = static_cast<float>(value);
  return std::fabs(nearest) > std::fabs(value) ? std::nextafter(nearest, 0.f) : nearest;
}

struct Operands {
  uint32_t a[4], b[2];
};

// Adds to a lane's 2 x 2 elements of c, the inner index from 0: `a` of two rows, `b` of
// two columns.
template <int depth>
EMULATOR_OWN void add_products(float (&c)[4], const double (&a)[2][depth],
                               const double (&b)[2][depth]) {
  for (unsigned e = 0; e < 4; ++e) {
    double sum = c[e];
    for (unsigned k = 0; k < depth; ++k) sum += a[e / 2][k] * b[e % 2][k];
    c[e] = cut_to_float(sum);
  }
}

EMULATOR_OWN inline double tf32(uint32_t bits) {
  bits &= ~0x1fffu;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Layouts as in the PTX ISA, "Matrix Fragments for mma.m16n8k8" with .tf32: with r =
// lane >> 2 and i = lane & 3, a[e] is (r + 8 for e = 1, 3; i + 4 for e = 2, 3), b[e] is
// (i + 4 e, r), c[e] is (r + 8 for e = 2, 3; 2 i + e % 2).
EMULATOR_OWN inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2]) {
  emulator::show(6, Operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const unsigned lane = emulator::block->current % 32;
  const unsigned char* first = emulator::slot_of(0);
  const auto shown = [first](unsigned of) EMULATOR_OWN {
    return reinterpret_cast<const Operands*>(first + of * emulator::Warp::slot_size);
  };
  double rows[2][8], columns[2][8];
  for (unsigned i = 0; i < 8; ++i) {  // at k = i / 2 + i % 2 * 4
    const Operands* row = shown(lane / 4 * 4 + i / 2);
    for (unsigned half = 0; half < 2; ++half) {
      const Operands* column = shown((lane % 4 * 2 + half) * 4 + i / 2);
      rows[half][i] = tf32(row->a[half + i % 2 * 2]);
      columns[half][i] = tf32(column->b[i % 2]);
    }
  }
  add_products(c, rows, columns);
}

// "mma.m16n8k4": a[e] is (r + 8 e, i), b[0] is (i, r).
inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[2],
                          const uint32_t (&b)[1]) {
  multiply_tf32(c, {a[0], a[1], 0, 0}, {b[0], 0});
}

// "mma.m16n8k16" with .f16 or .bf16: a[e] is (r + 8 for e = 1, 3; 2 i and one more, + 8
// for e = 2, 3), b[e] is (2 i and one more, + 8 e; r), the lower half first.
template <class Convert>
EMULATOR_OWN void multiply_halves(float (&c)[4], const uint32_t (&a)[4],
                                  const uint32_t (&b)[2], Convert convert) {
  emulator::show(10, Operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const unsigned lane = emulator::block->current % 32;
  const unsigned char* first = emulator::slot_of(0);
  const auto shown = [first](unsigned of) EMULATOR_OWN {
    return reinterpret_cast<const Operands*>(first + of * emulator::Warp::slot_size);
  };
  const auto half_of = [&](uint32_t word, unsigned half) EMULATOR_OWN -> double {
    return convert(static_cast<uint16_t>(word >> 16 * half));
  };
  double rows[2][16], columns[2][16];
  for (unsigned i = 0; i < 16; ++i) {  // at k = i / 4 * 2 + i / 2 % 2 * 8 + i % 2
    const Operands* row = shown(lane / 4 * 4 + i / 4);
    for (unsigned half = 0; half < 2; ++half) {
      const Operands* column = shown((lane % 4 * 2 + half) * 4 + i / 4);
      rows[half][i] = half_of(row->a[half + i / 2 % 2 * 2], i % 2);
      columns[half][i] = half_of(column->b[i / 2 % 2], i % 2);
    }
  }
  add_products(c, rows, columns);
}

inline void multiply_float16(float (&c)[4], const uint32_t (&a)[4],
                             const uint32_t (&b)[2]) {
  multiply_halves(c, a, b, half_to_float);
}

inline void multiply_bfloat16(float (&c)[4], const uint32_t (&a)[4],
                              const uint32_t (&b)[2]) {
  multiply_halves(c, a, b,
                  [](uint16_t bits) { return __uint_as_float(uint32_t{bits} << 16); });
}

}  // namespace fisherprune::cuda
