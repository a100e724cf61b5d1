// What the bodies of kernels ask of the compiler.
#pragma once

#define FISHERPRUNE_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define FISHERPRUNE_UNROLL _Pragma("unroll")
#else
#define FISHERPRUNE_UNROLL _Pragma("GCC unroll 32")
#endif
