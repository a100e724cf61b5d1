// Packing: from strided images of any dtype to the dense float32 the micro-kernels
// read. Each element is read once and written once.
#pragma once

#include <cstdint>

#include "grad_moments/contract.h"
#include "grad_moments/cpu/microkernel.h"
#include "grad_moments/cpu/plan.h"

namespace fisherprune::cpu::grad_moments {

// One sample of a view with the size of its images.
struct Image {
  View4 view;
  int64_t height, width;
  int64_t sample;
};

// The channels first, first + step, ...
struct Channels {
  int64_t first, step, count;
};

// to[c * to_stride + position] for the c-th of the channels.
void pack_planes(const Image& image, Channels from, Window window,
                 const Microkernels& kernels, float* to, int64_t to_stride);

// to[position * width + lane] for the lane-th of the channels; the lanes beyond them
// are zero.
void pack_lanes(const Image& image, Channels from, int64_t width, Window window,
                const Microkernels& kernels, float* to);

}  // namespace fisherprune::cpu::grad_moments
