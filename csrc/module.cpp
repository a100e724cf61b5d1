// fisherprune._C: plain facts about this build. Importing it registers the ops.
#include <pybind11/pybind11.h>

#include <string>

#include "build_facts.h"  // written by setup.py
#include "common/cpu/capability.h"

#ifdef __clang__
#define COMPILER "clang"
#else
#define COMPILER "gcc"
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about the compiled kernels of fisherprune.";
  m.attr("cuda_version") = FISHERPRUNE_CUDA_VERSION;    // "" = built without CUDA
  m.attr("cuda_archs") = FISHERPRUNE_CUDA_ARCHS;        // as in TORCH_CUDA_ARCH_LIST
  m.attr("torch_version") = FISHERPRUNE_TORCH_VERSION;  // the torch it was built with
  m.attr("source_hash") = FISHERPRUNE_SOURCE_HASH;      // of csrc/, see sources.py
  m.attr("compiler") = COMPILER " " __VERSION__;
  m.def(
      "cpu_capability",
      [] { return std::string(name_of(fisherprune::cpu::cpu_capability())); },
      "avx512, avx2 or portable");
}
