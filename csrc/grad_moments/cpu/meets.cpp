// Looks at the operands where they lie, position by position.
#include "grad_moments/cpu/meets.h"

#include "grad_moments/cpu/inside.h"

namespace fisherprune::cpu::grad_moments {
namespace {

bool is_zero(const View4& view, int64_t at) {
  if (view.dtype == Dtype::float32)
    return static_cast<const float*>(view.data)[at] == 0;
  return (static_cast<const uint16_t*>(view.data)[at] & 0x7fff) == 0;
}

int64_t place_of(const View4& view, int64_t n, int64_t c, int64_t h, int64_t w) {
  const int64_t* s = view.stride;
  return n * s[0] + c * s[1] + h * s[2] + w * s[3];
}

}  // namespace

bool meets(const GradMoments& moments, const Weight& weight) {
  const ConvShape& s = moments.shape;
  const View4 &input = moments.input, &grad = moments.grad;
  const int64_t h = weight.y - s.pad_h, w = weight.x - s.pad_w;
  const Inside rows = inside_of(h, 1, s.out_height, s.height);
  const Inside cols = inside_of(w, 1, s.out_width, s.width);
  for (int64_t n = 0; n < s.samples; ++n)
    for (int64_t p = rows.begin; p < rows.end; ++p) {
      const int64_t first_grad = place_of(grad, n, weight.output, p, 0);
      const int64_t first_input = place_of(input, n, weight.channel, p + h, w);
      for (int64_t q = cols.begin; q < cols.end; ++q)
        if (!is_zero(grad, first_grad + q * grad.stride[3]) &&
            !is_zero(input, first_input + q * input.stride[3]))
          return true;
    }
  return false;
}

}  // namespace fisherprune::cpu::grad_moments
