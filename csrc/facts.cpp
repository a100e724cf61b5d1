// The facts are compiled into the library that they describe: they are never stale.
#include "facts.h"

#include "build_facts.h"  // written by setup.py
#include "common/cpu/capability.h"

#ifdef __clang__
#define COMPILER "clang"
#else
#define COMPILER "gcc"
#endif

const FisherpruneFacts* fisherprune_facts() {
  static const FisherpruneFacts facts{
      FISHERPRUNE_CUDA_VERSION, FISHERPRUNE_CUDA_ARCHS,   FISHERPRUNE_TORCH_VERSION,
      FISHERPRUNE_SOURCE_HASH,  COMPILER " " __VERSION__,
  };
  return &facts;
}

const char* fisherprune_cpu_capability() {
  return name_of(fisherprune::cpu::cpu_capability());
}

bool fisherprune_mkl_is_narrow() { return fisherprune::cpu::mkl_is_narrow(); }
