// Packing: from strided images of any dtype to the dense float32 the micro-kernels
// read. Each element is read once and written once.
#pragma once

#include <cstdint>

#include "../grad_moments.h"
#include "grad_moments_plan.h"
#include "microkernel.h"

namespace fisherprune {

// One sample of a view with the size of its images.
struct Image {
  View4 view;
  int64_t height, width;
  int64_t sample;
};

// to[c * to_stride + position] for `count` channels from `channel` on.
void pack_planes(const Image& image, int64_t channel, int64_t count, Window window,
                 const Microkernels& kernels, float* to, int64_t to_stride);

// to[position * width + lane] for the channels channel + lane * channel_step; lanes
// beyond `lanes` are zero.
void pack_lanes(const Image& image, int64_t channel, int64_t channel_step,
                int64_t lanes, int64_t width, Window window,
                const Microkernels& kernels, float* to);

}  // namespace fisherprune
