// Compiles the depthwise way's kernels for each set of vector instructions.
#include "grad_moments/cpu/depthwise_kernels.h"

#include <algorithm>

#include "common/cpu/half_float.h"
#include "common/cpu/unroll.h"

namespace fisherprune::cpu::grad_moments::depthwise {

#define FISHERPRUNE_BODY "grad_moments/cpu/depthwise_body.h"
#include "common/cpu/each_capability.h"

const Kernels& kernels(Capability capability) { return table_of(capability); }

}  // namespace fisherprune::cpu::grad_moments::depthwise
