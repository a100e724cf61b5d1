// Compiles the kernel of transpose for each set of vector instructions, and deals a
// matrix out to threads.
#include "transpose/cpu/kernels.h"

#include <algorithm>

#include "common/cpu/unroll.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fisherprune::cpu::transpose {

#define FISHERPRUNE_BODY "transpose/cpu/body.h"
#include "common/cpu/each_capability.h"

const Kernels& kernels(Capability capability) { return table_of(capability); }

namespace {

constexpr int64_t kLine = 16;         // floats of a line of memory
constexpr int64_t kRows = 4 * kLine;  // of a panel, side by side in the output
constexpr int64_t kColumns = 1024;    // of a panel
constexpr int64_t kLarge = 1 << 20;   // floats that go past the caches

}  // namespace

void run(const Transpose& t, Capability capability, const Parallel& parallel) {
  const Kernels& code = kernels(capability);
  const int64_t down = (t.rows + kRows - 1) / kRows;
  const int64_t along = (t.columns + kColumns - 1) / kColumns;
  const bool past_caches = t.rows % kLine == 0 && t.rows * t.columns >= kLarge &&
                           reinterpret_cast<uintptr_t>(t.output) % 64 == 0;
  for_each_task(parallel, down * along, [&](int64_t task) {
    const int64_t i = task / along * kRows, j = task % along * kColumns;
    code.copy({std::min(kRows, t.rows - i), std::min(kColumns, t.columns - j),
               t.matrix + i * t.columns + j, t.columns, t.output + j * t.rows + i,
               t.rows, past_caches});
    code.drain();
  });
}

}  // namespace fisherprune::cpu::transpose
