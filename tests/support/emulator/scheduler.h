// Which thread runs, in which order, until when: of the blocks of a grid, one cluster
// of them after the other.
#pragma once

#include "fibers.h"

namespace emulator {

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

// Warps take turns of a few steps; some run as far ahead as they can. So does a block,
// before the others begin.
inline void run_cluster(std::mt19937_64& random) {
  const Block* alone = cluster[random() % cluster.size()].get();
  std::vector<std::pair<Block*, unsigned>> warps;
  for (const auto& each : cluster)
    for (unsigned first = 0; first < each->threads.size(); first += 32)
      warps.emplace_back(each.get(), first);
  for (;;) {
    bool any = false;
    std::shuffle(warps.begin(), warps.end(), random);
    for (const auto& [its_block, first] : warps) {
      if (alone && its_block != alone) continue;
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
    if (any || release_blocks()) continue;
    if (!alone) fail("threads wait for others in vain");
    alone = nullptr;
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

}  // namespace emulator
