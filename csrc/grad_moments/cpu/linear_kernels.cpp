// Compiles the linear way's kernels for each set of vector instructions.
#include "grad_moments/cpu/linear_kernels.h"

#include "common/cpu/unroll.h"

namespace fisherprune::cpu::grad_moments::linear {

#define FISHERPRUNE_BODY "grad_moments/cpu/linear_body.h"
#include "common/cpu/each_capability.h"

const Kernels& kernels(Capability capability) { return table_of(capability); }

}  // namespace fisherprune::cpu::grad_moments::linear
