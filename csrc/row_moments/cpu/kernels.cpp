// Who does what. Each task has some columns of all rows, whose entries are read once. A
// sum has one owner, which adds rows in one order: results are equal bit for bit,
// whatever the number of threads and the columns beside.
#include "row_moments/cpu/kernels.h"

#include <algorithm>

#include "common/cpu/half_float.h"
#include "common/cpu/unroll.h"
#include "common/integers.h"

namespace fisherprune::cpu::row_moments {

#define FISHERPRUNE_BODY "row_moments/cpu/body.h"
#include "common/cpu/each_capability.h"

void run(const RowMoments& moments, Capability capability, const Parallel& parallel) {
  const Kernels& code = table_of(capability);
  for_each_task(parallel, ceil_div(moments.size, kColumns), [&](int64_t task) {
    const int64_t first = task * kColumns;
    code.columns(moments, first, std::min(first + kColumns, moments.size));
  });
}

}  // namespace fisherprune::cpu::row_moments
