// The vector instructions the CPU kernels use: decided once, for all of them.
#pragma once

namespace fisherprune::cpu {

enum class Capability { portable, avx2, avx512 };

// The widest that this processor has, but no wider than the environment variable
// FISHERPRUNE_CPU_CAPABILITY (avx512, avx2 or portable) allows; throws where it holds
// anything else.
Capability cpu_capability();

const char* name_of(Capability capability);

// Whether MKL's products use half of this processor's vectors: those of 256 bits on all
// of AMD's, which have units for 512 from Zen 5 on.
bool mkl_is_narrow();

}  // namespace fisherprune::cpu
