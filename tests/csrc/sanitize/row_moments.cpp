// source: csrc/common/cpu/capability.cpp
// source: csrc/row_moments/cpu/kernels.cpp
//
// Random sizes in every instruction set, compared with a naive loop. Operands lie in
// heap blocks of their exact size: a read or write beyond them is reported.
#include "row_moments/cpu/kernels.h"

#include "driver.h"

namespace {

void check(const RowMoments& a) {
  for (int64_t p = 0; p < a.size; ++p) {
    double sum = 0, sum_sq = 0, size = 0;
    for (int64_t j = 0; j < a.groups; ++j) {
      double mean = 0;
      for (int64_t i = j * a.group_size; i < (j + 1) * a.group_size; ++i)
        mean += a.rows[i * a.stride + p] / double(a.group_size);
      sum += mean, sum_sq += mean * mean, size += std::abs(mean);
    }
    if (std::abs(a.sum[p] - sum) > 1e-5 * (1 + size) ||
        std::abs(a.sum_sq[p] - sum_sq) > 1e-5 * (1 + sum_sq))
      fail("row_moments: wrong at %ld: %g and %g, not %g and %g", long(p), a.sum[p],
           a.sum_sq[p], sum, sum_sq);
  }
}

void test(int64_t groups, int64_t group_size, int64_t size) {
  const int64_t count = groups * group_size, stride = size + draw(0, 3);
  const Block rows = drawn(count ? (count - 1) * stride + size : 0);
  for (const Capability capability : capabilities()) {
    const Block sum = empty(size), sum_sq = empty(size);
    const RowMoments call{groups, group_size, size,        rows.get(),
                          stride, sum.get(),  sum_sq.get()};
    row_moments::run(call, capability, two_threads);
    check(call);
  }
}

}  // namespace

int main() {
  for (int i = 0; i < 200; ++i) test(draw(0, 9), draw(1, 5), draw(0, 70));
  test(13, 1, 3 * row_moments::kColumns + 5);
  test(6, 3, 2 * row_moments::kColumns + 17);
  test(100, 1, 3);
  std::puts("row_moments: all right");
}
