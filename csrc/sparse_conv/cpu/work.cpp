// Reads the size of the second-level cache, once per process.
#include "sparse_conv/cpu/work.h"

#include <unistd.h>

namespace fisherprune::cpu::sparse_conv {
namespace {

int64_t cache_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return std::clamp<int64_t>(bytes, 256 << 10, 4 << 20);
#endif
  return 512 << 10;
}

}  // namespace

int64_t tile_floats() {
  static const int64_t floats = cache_bytes() / 2 / 4;
  return floats;
}

}  // namespace fisherprune::cpu::sparse_conv
