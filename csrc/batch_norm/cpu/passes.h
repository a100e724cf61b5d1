// The two passes over the entries that forward and backward share, the chunks' sums and
// the channels' coefficients.
//
// Who does what. Where there are channels enough a task owns one of them: it reads the
// chunks for their sums, adds these up to coefficients, and goes over the chunks again,
// from the last one back, which is in a cache still. Where there are few channels, or
// rows are short and read as columns, a task owns a chunk, and all wait between the
// passes.
//
// Memory traffic. Operands are read from memory once where those of the tasks at work
// fit into the last cache together, else twice; results are written once.
//
// The chunks' sums are added in the order of the chunks, in double.
#pragma once

#include <vector>

#include "batch_norm/cpu/chunks.h"
#include "batch_norm/cpu/core.h"

namespace fisherprune::cpu::batch_norm {

constexpr int64_t kTasksPerThread = 4;  // so that all threads end at about one time

class Passes {
 public:
  Passes(const BatchNormShape& shape, const Machine& machine)
      : shape_(shape),
        chunks(shape),
        table(kernels(machine.capability)),
        kind(chunks.columns),
        dtype(shape.dtype == Dtype::bfloat16),
        machine_(machine),
        all_sums_(3 * places()),
        all_coefficients_(4 * padded()) {}

  Sums sums(int64_t unit, int64_t chunk) {
    float* const all = all_sums_.data();
    return Sums{{all, all + places(), all + 2 * places()}}.from(
        chunks.sums_at(unit, chunk));
  }

  Coefficients coefficients(int64_t unit) const {
    const float* const all = all_coefficients_.data();
    return Coefficients{{all, all + padded(), all + 2 * padded(), all + 3 * padded()}}
        .from(unit);
  }

  // Sets coefficient k of a channel.
  void set(int k, int64_t channel, float value) {
    const int64_t width = chunks.columns ? shape_.inner : 1;
    float* const first = all_coefficients_.data() + k * padded() + channel * width;
    std::fill_n(first, width, value);
  }

  // Calls add(entries, sums) for all sums of a channel, in order.
  template <class Add>
  void for_sums(int64_t channel, const Add& add) {
    const int64_t width = chunks.columns ? shape_.inner : 1;
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      const Sums own =
          chunks.columns ? sums(0, chunk).from(channel * width) : sums(channel, chunk);
      for (int64_t b = 0; b < width; ++b) add(chunks.entries(chunk), own.from(b));
    }
  }

  // Runs first(unit, chunk) for all chunks, settle(channel), second(unit, chunk).
  template <class First, class Settle, class Second>
  void run(const First& first, const Settle& settle, const Second& second) const {
    const Parallel& parallel = machine_.parallel;
    const int64_t count = chunks.count, units = chunks.units;
    if (!chunks.columns && units >= kTasksPerThread * machine_.threads) {
      for_each_task(parallel, units, [&](int64_t unit) {
        for (int64_t chunk = 0; chunk < count; ++chunk) first(unit, chunk);
        settle(unit);
        for (int64_t chunk = count; chunk-- > 0;) second(unit, chunk);
      });
      return;
    }
    for_each_task(parallel, units * count,
                  [&](int64_t i) { first(i / count, i % count); });
    for_each_task(parallel, shape_.channels, settle);
    for_each_task(parallel, units * count, [&](int64_t i) {
      const int64_t back = units * count - 1 - i;
      second(back / count, back % count);
    });
  }

 private:
  int64_t places() const { return chunks.units * chunks.count * chunks.sums(); }

  // The coefficients of all columns, and room to load a vector from the last one.
  int64_t padded() const {
    return shape_.channels * (chunks.columns ? shape_.inner : 1) + table.lanes;
  }

  const BatchNormShape shape_;

 public:
  const Chunks chunks;
  const Kernels& table;
  const int kind, dtype;  // the table's

 private:
  const Machine& machine_;
  std::vector<float> all_sums_, all_coefficients_;
};

// An operand's entries from `at`.
inline const void* from(const void* data, int64_t at, int dtype) {
  return data ? static_cast<const char*>(data) + at * (dtype ? 2 : 4) : nullptr;
}

inline void* from(void* data, int64_t at, int dtype) {
  return data ? static_cast<char*>(data) + at * (dtype ? 2 : 4) : nullptr;
}

}  // namespace fisherprune::cpu::batch_norm
