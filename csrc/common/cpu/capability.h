// The vector instructions the CPU kernels use: decided once, for all of them.
#pragma once

namespace fisherprune::cpu {

enum class Capability { portable, avx2, avx512 };

// The widest that this processor has, but no wider than the environment variable
// FISHERPRUNE_CPU_CAPABILITY (avx512, avx2 or portable) allows; throws where it holds
// anything else.
Capability cpu_capability();

const char* name_of(Capability capability);

// Whether products by MKL run at half the speed of this processor: on all of AMD's they
// take vectors of 256 bits, and from Zen 5 on there are units for 512.
bool mkl_is_narrow();

}  // namespace fisherprune::cpu
