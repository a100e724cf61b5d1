// The vector instructions the CPU kernels use: decided once, for all of them.
#pragma once

namespace fisherprune::cpu {

enum class Capability { portable, avx2, avx512 };

// The widest that this processor has, but no wider than the environment variable
// FISHERPRUNE_CPU_CAPABILITY (avx512, avx2 or portable) allows; throws where it holds
// anything else.
Capability cpu_capability();

const char* name_of(Capability capability);

}  // namespace fisherprune::cpu
