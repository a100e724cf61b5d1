// Counts the cycles that shared memory takes for what a block's warps read and write
// by the instructions of ptx.cuh. In a cycle each of its 32 banks gives, or takes, a
// word; a word that several lanes want counts once. Accesses of 8 bytes are made by
// half a warp at a time, those of 16 bytes by a quarter.
#pragma once

#include <array>
#include <map>
#include <set>
#include <tuple>

#include "fibers.h"

namespace emulator {

inline bool counts_cycles = false;
inline uint64_t shared_cycles = 0;
inline uint64_t box_bytes = 0;  // that copies of boxes read of global memory

enum class Access { read, write, copy, matrices };

// What lanes do in one instruction: the n-th of its kind and size since the warp last
// met, or its lanes committed copies.
using Instruction = std::tuple<unsigned, uint64_t, Access, int, uint64_t>;

struct Lanes {
  std::array<int64_t, 32> at;  // bytes from the block's shared memory on
  Lanes() { at.fill(-1); }
};

inline std::map<Instruction, Lanes> accesses;
inline std::map<std::tuple<unsigned, uint64_t, Access, int>, uint64_t> accesses_so_far;

EMULATOR_OWN inline void note_access(Access access, const void* address, int bytes) {
  if (!counts_cycles) return;
  const unsigned thread = block->current;
  const uint64_t since = self().collectives + self().commits;
  const uint64_t nth = accesses_so_far[{thread, since, access, bytes}]++;
  accesses[{thread / 32, since, access, bytes, nth}].at[thread % 32] =
      static_cast<const unsigned char*>(address) - block->shared.get();
}

inline uint64_t cycles_of(const Lanes& lanes, int bytes) {
  const unsigned together = 128 / bytes;
  uint64_t cycles = 0;
  for (unsigned first = 0; first < 32; first += together) {
    std::array<std::set<int64_t>, 32> banks;
    for (unsigned lane = first; lane < first + together; ++lane)
      for (int i = 0; lanes.at[lane] >= 0 && i < bytes; i += 4) {
        const int64_t word = (lanes.at[lane] + i) / 4;
        banks[word % 32].insert(word);
      }
    size_t fullest = 0;
    for (const auto& words : banks) fullest = std::max(fullest, words.size());
    cycles += fullest;
  }
  return cycles;
}

// At a block's end.
inline void count_cycles() {
  for (const auto& [instruction, lanes] : accesses)
    shared_cycles += cycles_of(lanes, std::get<3>(instruction));
  accesses.clear();
  accesses_so_far.clear();
}

}  // namespace emulator
