// Runs CUDA kernels on the CPU, as the compiler's input and not as a re-telling: the
// kernels' headers include this file where the compiler is not nvcc.
//
// A block's threads are fibers. Between two points where they must meet (__syncthreads,
// a warp's collective) they run one after the other in an order drawn from a seed, each
// until it waits; so what needs a barrier and has none goes wrong soon. Blocks run one
// after the other. What hardware leaves open is made to hurt: shared memory starts as
// NaN; the target of an asynchronous copy becomes NaN when the copy starts and right
// only when its thread awaits it; tensor cores cut off sums. Arrays are separate
// allocations, shared memory is one per block, so the address sanitizer sees accesses
// beyond their ends. Threads that wait for each other in vain end the program.
#pragma once

#include <sanitizer/common_interface_defs.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1)
      : x(x_), y(y_), z(z_) {}
};
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

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

inline uint64_t seed = 1;
inline int multiprocessor_count = 4;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s (block %u, %u, thread %u)\n", what, blockIdx.x,
               blockIdx.y, threadIdx.x);
  std::_Exit(3);
}

struct Copy {
  void* to;
  const void* from;
  int size, bytes;  // of the target, of which the first come from the source
};

enum class State { ready, at_barrier, at_collective, done };

// A stack of its own and, while it rests, the place on it where it goes on. Switching
// is three dozen instructions: the C library's swapcontext calls the kernel.
struct Fiber {
  static constexpr size_t stack_size = 64 << 10;
  std::unique_ptr<char[]> stack;
  void* rests_at = nullptr;
  void* fake_stack = nullptr;  // the address sanitizer's
};

extern "C" void emulator_switch(void** rests_at, void* go_on_at);
asm(R"(
.text
.globl emulator_switch
emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

// Prepares a fiber that begins in `entry`, which never returns.
inline void begin_in(Fiber& fiber, void (*entry)()) {
  fiber.stack.reset(new char[Fiber::stack_size]);
  uintptr_t top = reinterpret_cast<uintptr_t>(fiber.stack.get() + Fiber::stack_size);
  void** at = reinterpret_cast<void**>(top & ~uintptr_t{15}) - 8;
  std::fill(at, at + 8, nullptr);  // six registers, the entry, no caller
  at[6] = reinterpret_cast<void*>(entry);
  fiber.rests_at = at;
}

struct Thread {
  Fiber fiber;
  State state = State::ready;
  int operation = 0;  // which collective it waits in
  uint64_t collectives = 0;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> committed;
};

// What the lanes of a warp show each other, twice: one lane may reach the next
// collective while another still reads this one.
struct Warp {
  static constexpr int slot_size = 32;
  alignas(16) unsigned char slot[2][32][slot_size];
};

struct Block {
  std::function<void()> body;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> shared;
  Fiber scheduler;  // on the program's own stack:
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  unsigned current = 0;
};

inline Block* block = nullptr;
inline Thread& self() { return block->threads[block->current]; }

inline void back_to_scheduler(bool for_good) {
  Fiber& fiber = self().fiber;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack,
                                 block->scheduler_stack, block->scheduler_stack_size);
  emulator_switch(&fiber.rests_at, block->scheduler.rests_at);
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
}

inline void wait_as(State state) {
  self().state = state;
  back_to_scheduler(false);
}

inline void enter_thread() {
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack,
                                  &block->scheduler_stack_size);
  block->body();
  for (const auto& group : self().committed)
    if (!group.empty()) fail("a thread ends with copies under way");
  if (!self().open.empty()) fail("a thread ends with copies under way");
  self().state = State::done;
  back_to_scheduler(true);
}

inline void run_thread(unsigned index) {
  block->current = index;
  threadIdx = dim3(index, 0, 0);
  Fiber& fiber = block->threads[index].fiber;
  __sanitizer_start_switch_fiber(&block->scheduler.fake_stack, fiber.stack.get(),
                                 Fiber::stack_size);
  emulator_switch(&block->scheduler.rests_at, fiber.rests_at);
  __sanitizer_finish_switch_fiber(block->scheduler.fake_stack, nullptr, nullptr);
}

// Whether threads [first, last) all wait in `state`; those that do go on.
inline bool release(unsigned first, unsigned last, State state) {
  for (unsigned i = first; i < last; ++i) {
    const Thread& thread = block->threads[i];
    if (thread.state != state) return false;
    if (thread.operation != block->threads[first].operation)
      fail("lanes of a warp meet in different operations");
  }
  for (unsigned i = first; i < last; ++i) block->threads[i].state = State::ready;
  return true;
}

inline bool release_any() {
  const unsigned size = static_cast<unsigned>(block->threads.size());
  bool any = release(0, size, State::at_barrier);
  for (unsigned lane = 0; lane < size; lane += 32)
    any |= release(lane, std::min(lane + 32, size), State::at_collective);
  return any;
}

inline void run_block(std::mt19937_64& random) {
  std::vector<unsigned> ready;
  for (;;) {
    ready.clear();
    unsigned done = 0;
    for (unsigned i = 0; i < block->threads.size(); ++i) {
      if (block->threads[i].state == State::ready) ready.push_back(i);
      done += block->threads[i].state == State::done;
    }
    if (done == block->threads.size()) return;
    if (ready.empty() && !release_any()) fail("threads wait for others in vain");
    std::shuffle(ready.begin(), ready.end(), random);
    for (const unsigned i : ready) run_thread(i);
  }
}

inline void start_threads(unsigned count) {
  block->threads = std::vector<Thread>(count);
  block->warps.resize((count + 31) / 32);
  for (Thread& thread : block->threads) begin_in(thread.fiber, enter_thread);
}

template <class Kernel>
void run_grid(dim3 grid, unsigned threads, size_t shared_bytes, Kernel kernel) {
  std::mt19937_64 random(seed);
  gridDim = grid;
  blockDim = dim3(threads);
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      Block now;
      block = &now;
      blockIdx = dim3(x, y, 0);
      now.body = kernel;
      now.shared.reset(new unsigned char[shared_bytes]);
      std::memset(now.shared.get(), 0xff, shared_bytes);  // NaN
      start_threads(threads);
      run_block(random);
      block = nullptr;
    }
}

// Meets the other lanes of the warp in `operation`; afterwards shown(lane) is theirs.
template <class Value>
void show(int operation, const Value& value) {
  static_assert(sizeof value <= Warp::slot_size);
  Thread& me = self();
  std::memcpy(
      block->warps[block->current / 32].slot[me.collectives++ % 2][block->current % 32],
      &value, sizeof value);
  me.operation = operation;
  wait_as(State::at_collective);
  me.operation = 0;
}

template <class Value>
Value shown(unsigned lane) {
  Value value;
  const uint64_t side = (self().collectives - 1) % 2;
  std::memcpy(&value, block->warps[block->current / 32].slot[side][lane], sizeof value);
  return value;
}

inline void require_full(unsigned lanes) {
  if (lanes != 0xffffffffu) fail("a collective of less than a warp");
}

inline void start_copy(const Copy& copy) {
  std::memset(copy.to, 0xff, copy.size);
  self().open.push_back(copy);
}

inline void finish_copy(const Copy& copy) {
  std::memcpy(copy.to, copy.from, copy.bytes);
  std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.size - copy.bytes);
}

}  // namespace emulator

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

template <class Value>
Value __shfl_xor_sync(unsigned lanes, Value value, unsigned mask) {
  emulator::require_full(lanes);
  emulator::show(5, value);
  return emulator::shown<Value>(emulator::block->current % 32 ^ mask);
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

namespace fisherprune {

// ---- what launch.cuh gives ----

using Stream = void*;

inline int multiprocessors() { return emulator::multiprocessor_count; }

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes,
            Stream, const Args&... args) {
  emulator::run_grid(grid, static_cast<unsigned>(threads), shared_bytes,
                     [=] { kernel(args...); });
}

inline unsigned char* dynamic_shared() { return emulator::block->shared.get(); }

// ---- what ptx.cuh gives ----

inline void copy4_async(float* shared, const float* global, bool inside) {
  emulator::start_copy({shared, global, 4, inside ? 4 : 0});
}

inline void copy16_async(float* shared, const float* global, int bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 ||
      reinterpret_cast<uintptr_t>(global) % 16)
    emulator::fail("copy16_async: addresses must be multiples of 16");
  emulator::start_copy({shared, global, 16, bytes});
}

inline void commit_copies() {
  emulator::self().committed.push_back(std::move(emulator::self().open));
  emulator::self().open.clear();
}

template <int newest>
void await_copies() {
  auto& committed = emulator::self().committed;
  for (; committed.size() > newest; committed.pop_front())
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

// Toward zero, as tensor cores do where they add.
inline float cut_to_float(double value) {
  const float nearest = static_cast<float>(value);
  return std::fabs(nearest) > std::fabs(value) ? std::nextafter(nearest, 0.f) : nearest;
}

// Layouts as in the PTX ISA, "Matrix Fragments for mma.m16n8k8" with .tf32: with r =
// lane >> 2 and i = lane & 3, a[e] is (r + 8 for e = 1, 3; i + 4 for e = 2, 3), b[e] is
// (i + 4 e, r), c[e] is (r + 8 for e = 2, 3; 2 i + e % 2).
struct Operands {
  uint32_t a[4], b[2];
};

inline double tf32(uint32_t bits) { return __uint_as_float(bits & ~0x1fffu); }

inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[4],
                          const uint32_t (&b)[2]) {
  emulator::show(6, Operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const unsigned lane = emulator::block->current % 32;
  double sum[4] = {c[0], c[1], c[2], c[3]};
  for (unsigned i = 0; i < 4; ++i) {  // k = i and i + 4
    const auto rows = emulator::shown<Operands>(lane / 4 * 4 + i);
    for (unsigned side = 0; side < 2; ++side) {
      const auto column = emulator::shown<Operands>((lane % 4 * 2 + side) * 4 + i);
      for (unsigned e = 0; e < 4; ++e)  // a's (row half, k half) = (e % 2, e / 2)
        sum[e % 2 * 2 + side] += tf32(rows.a[e]) * tf32(column.b[e / 2]);
    }
  }
  for (unsigned e = 0; e < 4; ++e) c[e] = cut_to_float(sum[e]);
}

}  // namespace fisherprune
