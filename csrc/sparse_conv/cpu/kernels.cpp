// Compiles the kernels of sparse convolutions for each set of vector instructions.
#include "sparse_conv/cpu/kernels.h"

#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/cpu/half_float.h"
#include "common/cpu/unroll.h"

namespace fisherprune::cpu::sparse_conv {

#define FISHERPRUNE_BODY "sparse_conv/cpu/body.h"
#include "common/cpu/each_capability.h"

const Kernels& kernels(Capability capability) { return table_of(capability); }

}  // namespace fisherprune::cpu::sparse_conv
