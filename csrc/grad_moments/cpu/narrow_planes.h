// How the narrow way lays down one call: as planes whose rows have one pitch. Depends
// on the shape and the strides alone.
#pragma once

#include <cstdint>
#include <vector>

#include "common/integers.h"
#include "grad_moments/contract.h"

namespace fisherprune::cpu::grad_moments {

// How the planes of a call lie.
struct Planes {
  int64_t pitch;        // of a row, of the input and of the gradient
  int64_t beyond_h;     // rows of the input's planes beyond those of the output
  int64_t phases;       // planes of one channel
  int64_t unit_rows;    // of the output, packed at a time
  int64_t input, grad;  // floats of one plane

  int64_t length(int64_t rows, const ConvShape& s, int64_t lanes) const {
    return round_up((rows - 1) * pitch + s.out_width, lanes);
  }
};

// The same call with longer rows where there are such: a column is as good as a row,
// and so is an image of which nothing is skipped and no neighbour is met.
GradMoments laid_down(GradMoments moments);

// What the taps of an axis begin with, modulo the stride, without repetition.
std::vector<int64_t> phases_of(int64_t kernel, int64_t stride, int64_t dilation);

// Floats of a convolution group's packed channels and outputs for some rows of the
// output.
double floats_of(const ConvShape& s, int64_t rows);

// `groups`: as many are packed at a time.
Planes planes_of(const ConvShape& s, int64_t groups, int64_t lanes);

}  // namespace fisherprune::cpu::grad_moments
