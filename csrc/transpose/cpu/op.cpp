// The op transpose on the CPU: checks, output, call.
#include <torch/csrc/stable/library.h>

#include "common/args.h"
#include "common/cpu/op.h"
#include "common/cpu/pages.h"
#include "transpose/cpu/kernels.h"

namespace fisherprune::cpu::transpose {
namespace {

Tensor transpose_op(const Tensor& matrix) {
  check(matrix.dim() == 2 && matrix.scalar_type() == ScalarType::Float &&
            matrix.is_contiguous(),
        "transpose: matrix must be a contiguous float32 tensor of two axes, got ",
        torch::headeronly::toString(matrix.scalar_type()), " of ", shape_of(matrix));
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  const Tensor output = torch::stable::new_empty(matrix, {columns, rows});
  prefer_large_pages({{output.data_ptr(), output.numel() * 4}}, in_parallel);
  run({rows, columns, static_cast<const float*>(matrix.data_ptr()),
       static_cast<float*>(output.data_ptr())},
      cpu_capability(), in_parallel);
  return output;
}

}  // namespace
}  // namespace fisherprune::cpu::transpose

STABLE_TORCH_LIBRARY_IMPL(fisherprune, CPU, m) {
  m.impl("transpose", TORCH_BOX(&fisherprune::cpu::transpose::transpose_op));
}
