// Compiles the narrow way's kernels for each set of vector instructions.
#include "grad_moments/cpu/narrow_kernels.h"

#include <cstring>
#include <type_traits>

#include "common/cpu/half_float.h"
#include "common/cpu/unroll.h"

namespace fisherprune::cpu::grad_moments::narrow {

#define FISHERPRUNE_BODY "grad_moments/cpu/narrow_body.h"
#include "common/cpu/each_capability.h"

const Kernels& kernels(Capability capability) { return table_of(capability); }

}  // namespace fisherprune::cpu::grad_moments::narrow
