// Reads the processor and the environment, once per process.
#include "common/cpu/capability.h"

#include <algorithm>
#include <cstdlib>
#include <string>

#include "common/check.h"

namespace fisherprune::cpu {
namespace {

Capability of_processor() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return Capability::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return Capability::avx2;
#endif
  return Capability::portable;
}

Capability of_environment() {
  const char* text = std::getenv("FISHERPRUNE_CPU_CAPABILITY");
  if (text == nullptr || *text == '\0') return Capability::avx512;
  for (const auto c : {Capability::portable, Capability::avx2, Capability::avx512})
    if (std::string(text) == name_of(c)) return c;
  check(false, "FISHERPRUNE_CPU_CAPABILITY must be avx512, avx2 or portable, got ",
        text);
  return Capability::portable;
}

}  // namespace

const char* name_of(Capability capability) {
  if (capability == Capability::avx512) return "avx512";
  return capability == Capability::avx2 ? "avx2" : "portable";
}

Capability cpu_capability() {
  static const Capability capability = std::min(of_processor(), of_environment());
  return capability;
}

bool mkl_is_narrow() {
#if defined(__x86_64__)
  // Of AMD's, Zen 5 is the first that intersects vectors of 512 bits.
  return __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512vp2intersect");
#else
  return false;
#endif
}

}  // namespace fisherprune::cpu
