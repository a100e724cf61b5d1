// The ops max_pool2d and max_pool2d_backward on the CPU: checks, outputs, calls.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/cpu/op.h"
#include "common/cpu/pages.h"
#include "max_pool/args.h"
#include "max_pool/cpu/core.h"

namespace fisherprune::cpu::max_pool {
namespace {

using Sizes = std::vector<int64_t>;

Sizes sizes_of(const Tensor& t) {
  Sizes sizes;
  for (int64_t i = 0; i < t.dim(); ++i) sizes.push_back(t.size(i));
  return sizes;
}

Tensor result(const Tensor& like, const Sizes& size, int32_t dtype) {
  const Tensor made = new_innermost(like, size, dtype);
  prefer_large_pages({{made.data_ptr(), made.numel() * made.element_size()}},
                     in_parallel);
  return made;
}

std::tuple<Tensor, Tensor> max_pool2d_op(const Tensor& input, Sizes kernel,
                                         Sizes stride, Sizes padding, bool ceil_mode) {
  constexpr char op[] = "max_pool2d";
  const View4 view = view_of(op, input, "input", "[N, C, H, W]");
  const MaxPoolShape s = max_pool_shape(op, view.dtype, sizes_of(input), kernel, stride,
                                        padding, ceil_mode);
  const Sizes size{s.samples, s.channels, s.out_height, s.out_width};
  const Tensor output = result(input, size, dtype_number(s.dtype));
  const Tensor index = result(input, size, aoti_torch_dtype_uint8());
  const Tensor x = samples_innermost(input, dtype_number(s.dtype));
  forward({s, x.data_ptr(), output.data_ptr(), static_cast<uint8_t*>(index.data_ptr())},
          cpu_capability(), in_parallel);
  return {output, index};
}

Tensor max_pool2d_backward_op(const Tensor& grad, const Tensor& index, Sizes input_size,
                              Sizes kernel, Sizes stride, Sizes padding,
                              bool ceil_mode) {
  constexpr char op[] = "max_pool2d_backward";
  const View4 view = view_of(op, grad, "grad", "[N, C, P, Q]");
  check(input_size.size() == 4, op, ": input_size must be four integers");
  const MaxPoolShape s =
      max_pool_shape(op, view.dtype, input_size, kernel, stride, padding, ceil_mode);
  const Sizes size{s.samples, s.channels, s.out_height, s.out_width};
  check(sizes_of(grad) == size, op, ": grad must have shape [", size[0], ", ", size[1],
        ", ", size[2], ", ", size[3], "], got ", shape_of(grad));
  check_device(op, index, "index", grad);
  check(sizes_of(index) == size && index.scalar_type() == ScalarType::Byte, op,
        ": index must be uint8 in the shape of grad, ", shape_of(grad), ", got ",
        shape_of(index));
  const Tensor grad_input = result(grad, input_size, dtype_number(s.dtype));
  const Tensor g = samples_innermost(grad, dtype_number(s.dtype));
  const Tensor i = samples_innermost(index, aoti_torch_dtype_uint8());
  backward({s, g.data_ptr(), static_cast<const uint8_t*>(i.data_ptr()),
            grad_input.data_ptr()},
           cpu_capability(), in_parallel);
  return grad_input;
}

}  // namespace
}  // namespace fisherprune::cpu::max_pool

STABLE_TORCH_LIBRARY_IMPL(fisherprune, CPU, m) {
  m.impl("max_pool2d", TORCH_BOX(&fisherprune::cpu::max_pool::max_pool2d_op));
  m.impl("max_pool2d_backward",
         TORCH_BOX(&fisherprune::cpu::max_pool::max_pool2d_backward_op));
}
