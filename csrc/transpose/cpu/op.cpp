// The op transpose on the CPU: checks, output, call.
#include <torch/csrc/stable/library.h>

#include "common/args.h"
#include "common/cpu/op.h"
#include "common/cpu/pages.h"
#include "transpose/cpu/kernels.h"

namespace fisherprune::cpu::transpose {
namespace {

Tensor transpose_op(const Tensor& matrix) {
  const ScalarType type = matrix.scalar_type();
  check(matrix.dim() == 2 && matrix.is_contiguous() &&
            (type == ScalarType::Float || type == ScalarType::BFloat16),
        "transpose: matrix must be a contiguous tensor of two axes, of float32 or "
        "bfloat16, got ",
        torch::headeronly::toString(type), " of ", shape_of(matrix));
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  const Tensor output = torch::stable::new_empty(matrix, {columns, rows});
  const int64_t bytes = output.numel() * static_cast<int64_t>(output.element_size());
  prefer_large_pages({{output.data_ptr(), bytes}}, in_parallel);
  run({rows, columns, dtype_of("transpose", matrix, "matrix"), matrix.data_ptr(),
       output.data_ptr()},
      cpu_capability(), in_parallel);
  return output;
}

}  // namespace
}  // namespace fisherprune::cpu::transpose

STABLE_TORCH_LIBRARY_IMPL(fisherprune, CPU, m) {
  m.impl("transpose", TORCH_BOX(&fisherprune::cpu::transpose::transpose_op));
}
