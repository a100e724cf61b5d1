// Compiles the kernel of transpose for each set of vector instructions, and deals a
// matrix out to threads.
#include "transpose/cpu/kernels.h"

#include <algorithm>

#include "common/cpu/half_float.h"
#include "common/cpu/unroll.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fisherprune::cpu::transpose {

#define FISHERPRUNE_BODY "transpose/cpu/body.h"
#include "common/cpu/each_capability.h"

const Kernels& kernels(Capability capability) { return table_of(capability); }

namespace {

constexpr int64_t kLine = 64;        // bytes of a line of memory
constexpr int64_t kLines = 4;        // that a column of a panel is in the output
constexpr int64_t kColumns = 1024;   // of a panel
constexpr int64_t kLarge = 1 << 22;  // bytes that go past the caches

}  // namespace

void run(const Transpose& t, Capability capability, const Parallel& parallel) {
  const Kernels& code = kernels(capability);
  const int64_t bytes = t.entry_bytes(), rows = kLines * kLine / bytes;
  const int64_t down = (t.rows + rows - 1) / rows;
  const int64_t along = (t.columns + kColumns - 1) / kColumns;
  const bool past_caches = t.rows * bytes % kLine == 0 &&
                           t.rows * t.columns * bytes >= kLarge &&
                           reinterpret_cast<uintptr_t>(t.output) % kLine == 0;
  const auto copy = bytes == 4 ? code.copy : code.copy_half;
  for_each_task(parallel, down * along, [&](int64_t task) {
    const int64_t i = task / along * rows, j = task % along * kColumns;
    copy({std::min(rows, t.rows - i), std::min(kColumns, t.columns - j),
          static_cast<const char*>(t.matrix) + (i * t.columns + j) * bytes, t.columns,
          static_cast<char*>(t.output) + (j * t.rows + i) * bytes, t.rows,
          past_caches});
    code.drain();
  });
}

}  // namespace fisherprune::cpu::transpose
