// source: csrc/common/cpu/capability.cpp
// source: csrc/transpose/cpu/kernels.cpp
//
// Random matrices in every instruction set, compared with a naive loop. They lie in
// heap blocks of their exact size: a read or write beyond them is reported.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>

#include "transpose/cpu/kernels.h"

namespace {

using namespace fisherprune;
using namespace fisherprune::cpu;

void two_threads(int64_t count, const Body& body) {
  std::thread other(body, 0, count / 2);
  body(count / 2, count);
  other.join();
}

template <class Bits>
void test(int64_t rows, int64_t columns, Dtype dtype) {
  const int64_t count = rows * columns;
  const std::unique_ptr<Bits[]> matrix(new Bits[count]), output(new Bits[count]);
  for (int64_t i = 0; i < count; ++i) matrix[i] = static_cast<Bits>(i);
  for (const Capability capability :
       {Capability::portable, Capability::avx2, Capability::avx512}) {
    if (capability > cpu_capability()) continue;
    transpose::run({rows, columns, dtype, matrix.get(), output.get()}, capability,
                   two_threads);
    for (int64_t i = 0; i < count; ++i)
      if (output[i % columns * rows + i / columns] != matrix[i]) {
        std::printf("transpose: %ld x %ld of %ld bytes differs\n",
                    static_cast<long>(rows), static_cast<long>(columns),
                    static_cast<long>(sizeof(Bits)));
        std::exit(1);
      }
  }
}

void test(int64_t rows, int64_t columns) {
  test<uint32_t>(rows, columns, Dtype::float32);
  test<uint16_t>(rows, columns, Dtype::bfloat16);
}

}  // namespace

int main() {
  std::mt19937 generator(22);
  std::uniform_int_distribution<int64_t> size(1, 200);
  for (int i = 0; i < 100; ++i) test(size(generator), size(generator));
  // Past the caches, where lines are whole.
  test(1024, 1040), test(1040, 1100), test(2048, 1040);
  std::puts("transpose: all equal");
}
