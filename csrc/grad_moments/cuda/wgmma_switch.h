// Whether products of warpgroups may be chosen: the environment asks for them, and the
// build and the device have them.
#pragma once

#include <cstdlib>
#include <string>

#include "common/check.h"

namespace fisherprune::cuda::grad_moments {

// What FISHERPRUNE_CUDA_WGMMA says. It is read in each call of the op, so that a
// program can compare both kernels.
inline bool wants_wgmma() {
  const char* variable = std::getenv("FISHERPRUNE_CUDA_WGMMA");
  const std::string text = variable ? variable : "";
  check(text.empty() || text == "0" || text == "1",
        "FISHERPRUNE_CUDA_WGMMA must be 0 or 1, got ", text);
  return text == "1";
}

// `archs`: those of the build, as in TORCH_CUDA_ARCH_LIST. They must name 9.0a, since
// kernels for 9.0 have no such products.
inline void check_wgmma(const std::string& archs, int major, int minor) {
  check(archs.find("9.0a") != std::string::npos,
        "FISHERPRUNE_CUDA_WGMMA=1 needs kernels for 9.0a, but they are built for ",
        archs, ": build with TORCH_CUDA_ARCH_LIST=\"", archs,
        ";9.0a\", or unset the variable");
  check(major == 9 && minor == 0,
        "FISHERPRUNE_CUDA_WGMMA=1 needs a device of compute capability 9.0, got ",
        major, ".", minor, ": unset the variable");
}

}  // namespace fisherprune::cuda::grad_moments
