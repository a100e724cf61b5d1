// Compiles the kernels of batch_norm for each set of vector instructions.
#include "batch_norm/cpu/kernels.h"

#include <algorithm>
#include <type_traits>

#include "common/cpu/half_float.h"
#include "common/cpu/unroll.h"

namespace fisherprune::cpu::batch_norm {

#define FISHERPRUNE_BODY "batch_norm/cpu/body.h"
#include "common/cpu/each_capability.h"

const Kernels& kernels(Capability capability) { return table_of(capability); }

}  // namespace fisherprune::cpu::batch_norm
