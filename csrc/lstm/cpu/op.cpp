// The ops lstm and lstm_backward on the CPU: checks, outputs, calls.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "common/cpu/op.h"
#include "common/cpu/pages.h"
#include "lstm/args.h"
#include "lstm/cpu/kernels.h"

namespace fisherprune::cpu::lstm {
namespace {

Tensor result(const Tensor& like, const std::vector<int64_t>& size) {
  const Tensor made = torch::stable::new_empty(like, size);
  prefer_large_pages({{made.data_ptr(), made.numel() * 4}}, in_parallel);
  return made;
}

float* floats_of(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_op(const Tensor& ih, const Tensor& h0,
                                                   const Tensor& c0,
                                                   const Tensor& weight,
                                                   std::optional<Tensor> bias) {
  constexpr char op[] = "lstm";
  const LstmShape s = lstm_shape(op, ih, "ih", 4);
  const std::vector<int64_t> state{s.samples, s.width};
  const std::vector<int64_t> states{s.samples, s.steps + 1, s.width};
  Lstm call{s,
            lstm_floats(op, ih, "ih", {s.samples, s.steps, 4 * s.width}),
            lstm_floats(op, h0, "h0", state),
            lstm_floats(op, c0, "c0", state),
            lstm_floats(op, weight, "weight", {4 * s.width, s.width}),
            bias ? lstm_floats(op, *bias, "bias", {4 * s.width}) : nullptr,
            nullptr,
            nullptr,
            nullptr,
            nullptr};
  const Tensor hidden = result(ih, states), cells = result(ih, states);
  const Tensor gates = result(ih, {s.samples, s.steps, 4 * s.width});
  const Tensor tanh = result(ih, {s.samples, s.steps, s.width});
  call.hidden = floats_of(hidden), call.cells = floats_of(cells);
  call.gates = floats_of(gates), call.tanh = floats_of(tanh);
  forward(call, cpu_capability(), in_parallel);
  return {hidden, cells, gates, tanh};
}

std::tuple<Tensor, Tensor, Tensor> lstm_backward_op(
    const Tensor& grad, const Tensor& last, const Tensor& weight, const Tensor& cells,
    const Tensor& gates, const Tensor& tanh) {
  constexpr char op[] = "lstm_backward";
  const LstmShape s = lstm_shape(op, grad, "grad", 1);
  const std::vector<int64_t> state{s.samples, s.width};
  const std::vector<int64_t> each{s.samples, s.steps, s.width};
  const std::vector<int64_t> all{s.samples, s.steps, 4 * s.width};
  LstmBackward call{s,
                    lstm_floats(op, grad, "grad", each),
                    lstm_floats(op, last, "last", state),
                    lstm_floats(op, weight, "weight", {4 * s.width, s.width}),
                    lstm_floats(op, cells, "cells", {s.samples, s.steps + 1, s.width}),
                    lstm_floats(op, gates, "gates", all),
                    lstm_floats(op, tanh, "tanh", each),
                    nullptr,
                    nullptr,
                    nullptr};
  const Tensor delta = result(grad, all);
  const Tensor grad_h0 = result(grad, state), grad_c0 = result(grad, state);
  call.delta = floats_of(delta);
  call.grad_h0 = floats_of(grad_h0), call.grad_c0 = floats_of(grad_c0);
  backward(call, cpu_capability(), in_parallel);
  return {delta, grad_h0, grad_c0};
}

}  // namespace
}  // namespace fisherprune::cpu::lstm

STABLE_TORCH_LIBRARY_IMPL(fisherprune, CPU, m) {
  m.impl("lstm", TORCH_BOX(&fisherprune::cpu::lstm::lstm_op));
  m.impl("lstm_backward", TORCH_BOX(&fisherprune::cpu::lstm::lstm_backward_op));
}
