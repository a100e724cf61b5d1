// Divisions of 64-bit integers that round up, for the host and for kernels.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FISHERPRUNE_HOST_DEVICE __host__ __device__
#else
#define FISHERPRUNE_HOST_DEVICE
#endif

namespace fisherprune {

// a / b, rounded up, for a >= 0 and b > 0.
FISHERPRUNE_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The least multiple of b that is not below a.
FISHERPRUNE_HOST_DEVICE constexpr int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

}  // namespace fisherprune
