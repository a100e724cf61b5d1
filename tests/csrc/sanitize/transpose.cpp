// source: csrc/common/cpu/capability.cpp
// source: csrc/transpose/cpu/kernels.cpp
//
// Random matrices in every instruction set, compared with a naive loop. They lie in
// heap blocks of their exact size: a read or write beyond them is reported.
#include "transpose/cpu/kernels.h"

#include "driver.h"

namespace {

template <class Bits>
void test(int64_t rows, int64_t columns, Dtype dtype) {
  const int64_t count = rows * columns;
  const std::unique_ptr<Bits[]> matrix(new Bits[count]), output(new Bits[count]);
  for (int64_t i = 0; i < count; ++i) matrix[i] = static_cast<Bits>(i);
  for (const Capability capability : capabilities()) {
    transpose::run({rows, columns, dtype, matrix.get(), output.get()}, capability,
                   two_threads);
    for (int64_t i = 0; i < count; ++i)
      if (output[i % columns * rows + i / columns] != matrix[i])
        fail("transpose: %ld x %ld of %ld bytes differs", long(rows), long(columns),
             long(sizeof(Bits)));
  }
}

void test(int64_t rows, int64_t columns) {
  test<uint32_t>(rows, columns, Dtype::float32);
  test<uint16_t>(rows, columns, Dtype::bfloat16);
}

}  // namespace

int main() {
  for (int i = 0; i < cases(100); ++i) test(draw(1, 200), draw(1, 200));
  // Past the caches, where lines are whole.
  test(1024, 1040), test(1040, 1100), test(2048, 1040);
  std::puts("transpose: all equal");
}
