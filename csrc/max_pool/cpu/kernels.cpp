// Compiles the kernels of max_pool2d for each set of vector instructions.
#include "max_pool/cpu/kernels.h"

#include <cstring>
#include <limits>
#include <type_traits>

#include "common/cpu/half_float.h"
#include "common/cpu/unroll.h"

namespace fisherprune::cpu::max_pool {

#define FISHERPRUNE_BODY "max_pool/cpu/body.h"
#include "common/cpu/each_capability.h"

const Kernels& kernels(Capability capability) { return table_of(capability); }

}  // namespace fisherprune::cpu::max_pool
