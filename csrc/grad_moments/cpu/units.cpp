// A run ends where its group does, and where it has as many positions as one may have;
// groups that outlast a block go on in the next one.
#include "grad_moments/cpu/units.h"

#include <algorithm>

#include "common/integers.h"

namespace fisherprune::cpu::grad_moments {
namespace {

// As many samples as make blocks of equal size, at most `most`; whole groups where that
// holds one.
int64_t units_of_block(int64_t samples, int64_t group, int64_t most) {
  most = std::clamp<int64_t>(most, 1, samples);
  const int64_t equal = ceil_div(samples, ceil_div(samples, most));
  if (group > most) return equal;
  return std::min(round_up(equal, group), most / group * group);
}

}  // namespace

Units units_of(int64_t samples, int64_t rows, int64_t cols, int64_t group_size,
               int64_t most_rows, int64_t most_units) {
  const int64_t group = std::min(group_size, samples);
  const int64_t unit_rows = std::clamp<int64_t>(most_rows, 1, rows);
  const int64_t cuts = ceil_div(rows, unit_rows);
  const int64_t block = cuts > 1 ? 1 : units_of_block(samples, group, most_units);
  return {samples, rows, cols, group, unit_rows, cuts, samples * cuts, block};
}

int64_t Units::rows_of(int64_t unit) const {
  return std::min(unit_rows, rows - first_row_of(unit));
}

int64_t Units::positions_of(Block block) const {
  int64_t all = 0;
  for (int64_t u = block.first; u < block.last; ++u) all += rows_of(u);
  return all * cols;
}

Block Units::block_at(int64_t first) const {
  return {first, std::min(first + block_units, count)};
}

std::vector<Run> Units::runs_of(Block block, int64_t most) const {
  std::vector<Run> runs;
  const int64_t group_units = group_size * per_sample;
  int64_t at = 0;
  for (int64_t u = block.first; u < block.last;) {
    const int64_t begun = u / group_units * group_units;
    const int64_t complete = std::min(begun + group_units, count);
    const int64_t stop = std::min(complete, block.last);
    const int64_t end = at + positions_of({u, stop});
    const float scale = 1.f / static_cast<float>((complete - begun) / per_sample);
    bool continues = u > begun;
    while (at < end) {
      const int64_t next = std::min(at + most, end);
      runs.push_back({static_cast<int32_t>(at), static_cast<int32_t>(next), scale,
                      continues, next == end && stop == complete});
      continues = true;
      at = next;
    }
    u = stop;
  }
  return runs;
}

bool Units::carries(int64_t most) const {
  for (int64_t u = 0; u < count; u += block_units)
    for (const Run& run : runs_of(block_at(u), most))
      if (run.continues || !run.finishes) return true;
  return false;
}

}  // namespace fisherprune::cpu::grad_moments
