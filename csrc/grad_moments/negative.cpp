// grad_moments of lazily negated views, such as z.conj().imag. Torch's own handling
// makes copies with the right sign: those of operands are what the op needs, but torch
// has no way to write an accumulator back, and fails without a clear message.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <vector>

#include "common/check.h"

namespace fisherprune {
namespace {

using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

// Calls an op of one tensor.
template <class Result>
Result call(const char* op, const Tensor& argument) {
  std::array<StableIValue, 1> stack{from(argument)};
  const auto error = torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION);
  check(error == AOTI_TORCH_SUCCESS, "fisherprune: ", op, " failed");
  return to<Result>(stack[0]);
}

Tensor resolved(const Tensor& t) { return call<Tensor>("aten::resolve_neg", t); }

void check_plain(const Tensor& t, const char* name) {
  check(!call<bool>("aten::is_neg", t), "grad_moments: ", name,
        " must be a tensor of its own, got a lazily negated view of another one");
}

void resolve_operands(const Tensor& input, const Tensor& grad, const Tensor& sum,
                      const Tensor& sum_sq, std::vector<int64_t> stride,
                      std::vector<int64_t> padding, std::vector<int64_t> dilation,
                      int64_t groups, int64_t group_size, bool allow_tf32) {
  check_plain(sum, "sum");
  check_plain(sum_sq, "sum_sq");
  std::array<StableIValue, 10> stack{
      from(resolved(input)), from(resolved(grad)), from(sum),      from(sum_sq),
      from(stride),          from(padding),        from(dilation), from(groups),
      from(group_size),      from(allow_tf32)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("fisherprune::grad_moments", "",
                                                      stack.data(), TORCH_ABI_VERSION));
}

}  // namespace
}  // namespace fisherprune

STABLE_TORCH_LIBRARY_IMPL(fisherprune, Negative, m) {
  m.impl("grad_moments", TORCH_BOX(&fisherprune::resolve_operands));
}
