// What the drivers share: random numbers, heap blocks of their exact size, threads, the
// instruction sets of this processor, and the end at a wrong result.
#pragma once

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "common/cpu/capability.h"
#include "common/cpu/half_float.h"
#include "common/cpu/parallel.h"
#include "common/view.h"

using namespace fisherprune;
using namespace fisherprune::cpu;

inline std::mt19937 generator(20);

// How many of some random cases to try: under ThreadSanitizer, which asks for races
// alone and whose code is slow, a fourth.
inline int cases(int number) {
#ifdef __SANITIZE_THREAD__
  return (number + 3) / 4;
#else
  return number;
#endif
}

inline int64_t draw(int64_t least, int64_t most) {
  return std::uniform_int_distribution<int64_t>(least, most)(generator);
}

[[noreturn, gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
  va_list values;
  va_start(values, format);
  std::vprintf(format, values);
  va_end(values);
  std::puts("");
  std::exit(1);
}

inline std::vector<Capability> capabilities() {
  std::vector<Capability> all{Capability::portable};
  for (const Capability wider : {Capability::avx2, Capability::avx512})
    if (wider <= cpu_capability()) all.push_back(wider);
  return all;
}

// Each thread has its share of the tasks to begin with.
inline void in_threads(int threads, int64_t count, const Body& body) {
  std::vector<std::thread> running;
  for (int t = 0; t < threads; ++t)
    running.emplace_back(body, count * t / threads, count * (t + 1) / threads);
  for (std::thread& t : running) t.join();
}

inline Parallel on_threads(int number) {
  return [number](int64_t count, const Body& body) { in_threads(number, count, body); };
}

inline const Parallel two_threads = on_threads(2);

// Float32 numbers of a normal distribution, or what a kernel writes.
using Block = std::unique_ptr<float[]>;

inline Block empty(int64_t count) { return Block(new float[count]); }

inline Block drawn(int64_t count) {
  std::normal_distribution<float> normal;
  Block block = empty(count);
  for (int64_t i = 0; i < count; ++i) block[i] = normal(generator);
  return block;
}

// Entries of any dtype, or what a kernel writes; null where there are none.
struct Entries {
  Dtype dtype;
  int64_t count;
  std::unique_ptr<char[]> memory;

  Entries(Dtype type, int64_t n)
      : dtype(type), count(n), memory(n ? new char[n * bytes()] : nullptr) {}

  int64_t bytes() const { return dtype == Dtype::float32 ? 4 : 2; }
  void* data() const { return memory.get(); }
  float* floats() const { return static_cast<float*>(data()); }

  float at(int64_t i) const {
    if (dtype == Dtype::float32) return floats()[i];
    if (dtype == Dtype::float16) return to_float(static_cast<Float16*>(data())[i]);
    return to_float(static_cast<BFloat16*>(data())[i]);
  }

  // float32 and bfloat16 alone, which must hold the value exactly.
  void set(int64_t i, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    set_bits(i, dtype == Dtype::float32 ? bits : bits >> 16);
  }

  void set_bits(int64_t i, uint32_t bits) {
    std::memcpy(memory.get() + i * bytes(), &bits, bytes());
  }
};
