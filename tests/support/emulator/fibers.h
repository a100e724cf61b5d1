// A block's threads as fibers, their meetings, their asynchronous copies: the engine of
// emulator.h, which says what it is for.
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

// Runs each thread of a warp that can, up to where it waits.
inline bool step_warp(unsigned first, unsigned last, std::mt19937_64& random) {
  release(first, last, State::at_collective);
  unsigned ready[32], count = 0;
  for (unsigned i = first; i < last; ++i) {
    Thread& thread = block->threads[i];
    if (thread.state == State::awaits && thread.may_go_on())
      thread.state = State::ready;
    if (thread.state == State::ready) ready[count++] = i;
  }
  std::shuffle(ready, ready + count, random);
  for (unsigned i = 0; i < count; ++i) run_thread(ready[i]);
  return count > 0;
}

inline bool all_are(State state) {
  for (const auto& each : cluster)
    for (const Thread& thread : each->threads)
      if (thread.state != state) return false;
  return true;
}

// Ends one of the things that are under way.
inline bool end_one(std::mt19937_64& random) {
  if (under_way.empty()) return false;
  std::swap(under_way[random() % under_way.size()], under_way.back());
  const std::function<void()> end = std::move(under_way.back());
  under_way.pop_back();
  end();
  return true;
}

// Lets those go on who wait for all threads of their block, or of their cluster.
inline bool release_blocks() {
  bool any = false;
  for (const auto& each : cluster) {
    enter(*each);
    any |= release(0, static_cast<unsigned>(each->threads.size()), State::at_barrier);
  }
  if (any || !all_are(State::at_cluster)) return any;
  for (const auto& each : cluster)
    for (Thread& thread : each->threads) thread.state = State::ready;
  return true;
}

// Warps take turns of a few steps; some run as far ahead as they can.
inline void run_cluster(std::mt19937_64& random) {
  std::vector<std::pair<Block*, unsigned>> warps;
  for (const auto& each : cluster)
    for (unsigned first = 0; first < each->threads.size(); first += 32)
      warps.emplace_back(each.get(), first);
  for (;;) {
    bool any = false;
    std::shuffle(warps.begin(), warps.end(), random);
    for (const auto& [its_block, first] : warps) {
      enter(*its_block);
      const unsigned size = static_cast<unsigned>(block->threads.size());
      const uint64_t turn = random();
      const uint64_t steps = turn % 4 ? 1 + turn / 4 % 8 : ~uint64_t{0};
      for (uint64_t i = 0; i < steps; ++i) {
        if (!step_warp(first, std::min(first + 32, size), random)) break;
        any = true;
      }
    }
    if (all_are(State::done)) {
      if (!under_way.empty()) fail("a block ends with copies under way");
      return;
    }
    if ((!any || random() % 4 == 0) && end_one(random)) continue;
    if (!any && !release_blocks()) fail("threads wait for others in vain");
  }
}

inline void start_block(dim3 place, unsigned threads, size_t shared_bytes,
                        const std::function<void()>& body) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  size_t stack = cluster.size() * threads;
  while (stacks.size() < stack + threads)
    stacks.emplace_back(new char[Fiber::stack_size]);
  cluster.emplace_back(new Block);
  Block& now = *cluster.back();
  now.place = place;
  now.body = body;
  now.shared.reset(new unsigned char[shared_bytes]);
  now.shared_bytes = shared_bytes;
  std::memset(now.shared.get(), 0xff, shared_bytes);  // NaN
  now.threads = std::vector<Thread>(threads);
  now.warps.resize((threads + 31) / 32);
  for (Thread& thread : now.threads)
    begin_in(thread.fiber, stacks[stack++].get(), enter_thread);
}

// The first blocks of a grid's clusters, in an order drawn at random.
inline std::vector<dim3> blocks_of(dim3 grid, unsigned size, std::mt19937_64& random) {
  std::vector<dim3> blocks;
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; x += size) blocks.emplace_back(x, y, 0);
  std::shuffle(blocks.begin(), blocks.end(), random);
  return blocks;
}

// `size` neighbours run together. `at_end` is called at the end of each block.
template <class Kernel>
void run_grid(dim3 grid, unsigned size, unsigned threads, size_t shared_bytes,
              Kernel kernel, void (*at_end)()) {
  std::mt19937_64 random(seed);
  gridDim = grid;
  blockDim = dim3(threads);
  if (grid.x % size) fail("a grid of clusters that are not full");
  for (const dim3 first : blocks_of(grid, size, random)) {
    for (unsigned i = 0; i < size; ++i)
      start_block(dim3(first.x + i, first.y), threads, shared_bytes, kernel);
    run_cluster(random);
    for (const auto& each : cluster) {
      enter(*each);
      at_end();
    }
    cluster.clear();
    block = nullptr;
  }
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
