// A block's threads as fibers, what they show each other, their asynchronous copies:
// with scheduler.h the engine of emulator.h, which says what it is for.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1)
      : x(x_), y(y_), z(z_) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// Of functions that are called a million times and read nothing that a kernel points
// to: the sanitizers would take most of the time, and have nothing to find there.
#define EMULATOR_OWN __attribute__((no_sanitize("address", "undefined")))

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

enum class State { ready, at_barrier, at_collective, at_cluster, awaits, done };

// A barrier in shared memory.
struct Barrier {
  int arrivals, missing;  // of a phase
  int64_t bytes;          // that are expected and have not landed
  uint64_t phases;        // that have ended
  bool published;         // asynchronous copies see it

  void end_phase() {
    if (missing > 0 || bytes != 0) return;
    missing = arrivals;
    ++phases;
  }
};

// Products of matrices in shared memory that a thread takes part in.
struct Product {
  uint64_t a, b;
  bool adds;
};
struct Products {
  bool begun = false, early = false;
  std::vector<float> results;  // so far
  std::vector<Product> late;
};

// A stack of its own and, while it rests, the place on it where it goes on. Switching
// is three dozen instructions: the C library's swapcontext calls the kernel.
struct Fiber {
  static constexpr size_t stack_size = 64 << 10;
  char* stack = nullptr;
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

// Prepares a fiber that begins in `entry`, which never returns, on a stack where others
// may have ended before.
inline void begin_in(Fiber& fiber, char* stack, void (*entry)()) {
  __asan_unpoison_memory_region(stack, Fiber::stack_size);
  fiber.stack = stack;
  uintptr_t top = reinterpret_cast<uintptr_t>(stack + Fiber::stack_size);
  void** at = reinterpret_cast<void**>(top & ~uintptr_t{15}) - 8;
  std::fill(at, at + 8, nullptr);  // six registers, the entry, no caller
  at[6] = reinterpret_cast<void*>(entry);
  fiber.rests_at = at;
}

struct Thread {
  Fiber fiber;
  State state = State::ready;
  int operation = 0;  // which collective it waits in
  uint64_t collectives = 0, commits = 0;
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> committed;
  std::function<bool()> may_go_on;  // where it awaits something
  Products products;
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
  size_t shared_bytes = 0;
  std::map<uint32_t, Barrier> barriers;  // by their place in shared memory
  dim3 place;
  Fiber scheduler;  // on the program's own stack:
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  unsigned current = 0;
};

inline Block* block = nullptr;                        // whose thread runs
inline std::vector<std::unique_ptr<Block>> cluster;   // blocks that run together
inline std::vector<std::function<void()>> under_way;  // what ends at its own moment

inline void enter(Block& other) {
  block = &other;
  blockIdx = other.place;
}

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

template <class Condition>
void wait_until(Condition may_go_on) {
  self().may_go_on = may_go_on;
  wait_as(State::awaits);
}

inline void enter_thread() {
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack,
                                  &block->scheduler_stack_size);
  block->body();
  for (const auto& group : self().committed)
    if (!group.empty()) fail("a thread ends with copies under way");
  if (!self().open.empty()) fail("a thread ends with copies under way");
  if (self().products.begun) fail("a thread ends with products under way");
  self().state = State::done;
  back_to_scheduler(true);
}

inline void run_thread(unsigned index) {
  block->current = index;
  threadIdx = dim3(index, 0, 0);
  Fiber& fiber = block->threads[index].fiber;
  __sanitizer_start_switch_fiber(&block->scheduler.fake_stack, fiber.stack,
                                 Fiber::stack_size);
  emulator_switch(&block->scheduler.rests_at, fiber.rests_at);
  __sanitizer_finish_switch_fiber(block->scheduler.fake_stack, nullptr, nullptr);
}

// Meets the other lanes of the warp in `operation`; afterwards shown(lane) is theirs.
template <class Value>
EMULATOR_OWN void show(int operation, const Value& value) {
  static_assert(sizeof value <= Warp::slot_size);
  Thread& me = self();
  std::memcpy(
      block->warps[block->current / 32].slot[me.collectives++ % 2][block->current % 32],
      &value, sizeof value);
  me.operation = operation;
  wait_as(State::at_collective);
  me.operation = 0;
}

// What a lane shows: the first of values that lie `Warp::slot_size` apart.
inline const unsigned char* slot_of(unsigned lane) {
  const uint64_t side = (self().collectives - 1) % 2;
  return block->warps[block->current / 32].slot[side][lane];
}

template <class Value>
EMULATOR_OWN Value shown(unsigned lane) {
  Value value;
  std::memcpy(&value, slot_of(lane), sizeof value);
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
