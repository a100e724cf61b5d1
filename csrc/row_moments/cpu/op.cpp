// The op row_moments on the CPU: checks, outputs, call.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/args.h"
#include "common/cpu/op.h"
#include "row_moments/cpu/kernels.h"

namespace fisherprune::cpu::row_moments {
namespace {

constexpr char kOp[] = "row_moments";

std::tuple<Tensor, Tensor> op(const Tensor& rows, int64_t group_size) {
  const ScalarType type = rows.scalar_type();
  check(rows.dim() == 2 && type == ScalarType::Float, kOp,
        ": rows must be float32 [N, P], got ", torch::headeronly::toString(type), " ",
        shape_of(rows));
  const int64_t count = rows.size(0), size = rows.size(1);
  check(size < 2 || rows.stride(1) == 1, kOp,
        ": the entries of a row must lie side by side, got the stride ",
        rows.stride(1));
  check(group_size >= 1 && count % group_size == 0, kOp,
        ": group_size must divide the number of rows, ", count, ", got ", group_size);
  const Tensor sum = torch::stable::new_empty(rows, {size}),
               sum_sq = torch::stable::new_empty(rows, {size});
  run({count / group_size, group_size, size, static_cast<const float*>(rows.data_ptr()),
       rows.stride(0), static_cast<float*>(sum.data_ptr()),
       static_cast<float*>(sum_sq.data_ptr())},
      cpu_capability(), in_parallel);
  return {sum, sum_sq};
}

}  // namespace
}  // namespace fisherprune::cpu::row_moments

STABLE_TORCH_LIBRARY_IMPL(fisherprune, CPU, m) {
  m.impl("row_moments", TORCH_BOX(&fisherprune::cpu::row_moments::op));
}
