// source: csrc/common/cpu/capability.cpp
// source: csrc/lstm/cpu/kernels.cpp
//
// Random sizes in every instruction set, compared with a naive loop. Operands lie in
// heap blocks of their exact size: a read or write beyond them is reported.
#include "lstm/cpu/kernels.h"

#include "driver.h"

namespace {

void compare(double found, double wanted, const char* what) {
  if (std::abs(found - wanted) <= 1e-4 * (1 + std::abs(wanted))) return;
  fail("lstm: wrong %s: %g, not %g", what, found, wanted);
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// Each step from the kernel's own states before it.
void check_forward(const Lstm& s) {
  const auto [samples, steps, width] = s.shape;
  for (int64_t n = 0; n < samples; ++n)
    for (int64_t t = 0; t < steps; ++t)
      for (int64_t j = 0; j < width; ++j) {
        const int64_t at = n * steps + t, before = (at + n) * width;
        double gate[4];
        for (int k = 0; k < 4; ++k) {
          const int64_t row = k * width + j;
          double x = s.ih[at * 4 * width + row] + (s.bias ? s.bias[row] : 0);
          for (int64_t i = 0; i < width; ++i)
            x += double(s.weight[row * width + i]) * s.hidden[before + i];
          gate[k] = k == 2 ? std::tanh(x) : sigmoid(x);
          compare(s.gates[at * 4 * width + row], gate[k], "gate");
        }
        const double c = gate[1] * s.cells[before + j] + gate[0] * gate[2];
        compare(s.cells[before + width + j], c, "cell");
        compare(s.tanh[at * width + j], std::tanh(c), "tanh");
        compare(s.hidden[before + width + j], gate[3] * std::tanh(c), "state");
      }
}

void check_backward(const LstmBackward& s) {
  const auto [samples, steps, width] = s.shape;
  for (int64_t n = 0; n < samples; ++n) {
    Block c = empty(width), h = empty(width);
    for (int64_t j = 0; j < width; ++j) c[j] = s.last[n * width + j], h[j] = 0;
    for (int64_t t = steps - 1; t >= 0; --t) {
      const int64_t at = n * steps + t;
      const float *gates = s.gates + at * 4 * width, *delta = s.delta + at * 4 * width;
      for (int64_t j = 0; j < width; ++j) {
        const double i = gates[j], f = gates[width + j], g = gates[2 * width + j];
        const double o = gates[3 * width + j], tanh = s.tanh[at * width + j];
        const double d_h = s.grad[at * width + j] + h[j];
        const double d_c = c[j] + d_h * o * (1 - tanh * tanh);
        compare(delta[j], d_c * g * i * (1 - i), "gradient of i");
        compare(delta[width + j], d_c * s.cells[(at + n) * width + j] * f * (1 - f),
                "gradient of f");
        compare(delta[2 * width + j], d_c * i * (1 - g * g), "gradient of g");
        compare(delta[3 * width + j], d_h * tanh * o * (1 - o), "gradient of o");
        c[j] = static_cast<float>(d_c * f);
      }
      for (int64_t j = 0; j < width; ++j) {
        double sum = 0;
        for (int64_t row = 0; row < 4 * width; ++row)
          sum += double(delta[row]) * s.weight[row * width + j];
        h[j] = static_cast<float>(sum);
      }
    }
    for (int64_t j = 0; j < width; ++j) {
      compare(s.grad_h0[n * width + j], h[j], "gradient of h0");
      compare(s.grad_c0[n * width + j], c[j], "gradient of c0");
    }
  }
}

void test(const LstmShape& shape, bool has_bias) {
  const auto [n, t, w] = shape;
  const Block ih = drawn(n * t * 4 * w), h0 = drawn(n * w), c0 = drawn(n * w);
  const Block weight = drawn(4 * w * w), bias = drawn(4 * w);
  const Block grad = drawn(n * t * w), last = drawn(n * w);
  for (const Capability capability : capabilities()) {
    const Block hidden = empty(n * (t + 1) * w), cells = empty(n * (t + 1) * w);
    const Block gates = empty(n * t * 4 * w), tanh = empty(n * t * w);
    const Lstm call{shape,        ih.get(),     h0.get(),
                    c0.get(),     weight.get(), has_bias ? bias.get() : nullptr,
                    hidden.get(), cells.get(),  gates.get(),
                    tanh.get()};
    lstm::forward(call, capability, two_threads);
    check_forward(call);
    const Block delta = empty(n * t * 4 * w);
    const Block grad_h0 = empty(n * w), grad_c0 = empty(n * w);
    const LstmBackward back{shape,         grad.get(),   last.get(), weight.get(),
                            cells.get(),   gates.get(),  tanh.get(), delta.get(),
                            grad_h0.get(), grad_c0.get()};
    lstm::backward(back, capability, two_threads);
    check_backward(back);
  }
}

}  // namespace

int main() {
  for (int i = 0; i < cases(40); ++i)
    test({draw(1, 40), draw(0, 4), draw(1, 70)}, i % 2 == 0);
  std::puts("lstm: all equal");
}
