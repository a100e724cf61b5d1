// What the library of kernels tells about itself: in C, for readers of any compiler.
#pragma once

extern "C" {

struct FisherpruneFacts {
  const char* cuda_version;   // "" = built without CUDA
  const char* cuda_archs;     // as in TORCH_CUDA_ARCH_LIST
  const char* torch_version;  // the torch it was built with
  const char* source_hash;    // of csrc/, see sources.py
  const char* compiler;
};

__attribute__((visibility("default"))) const FisherpruneFacts* fisherprune_facts();

// avx512, avx2 or portable; throws as cpu_capability() does.
__attribute__((visibility("default"))) const char* fisherprune_cpu_capability();

// As mkl_is_narrow().
__attribute__((visibility("default"))) bool fisherprune_mkl_is_narrow();
}
