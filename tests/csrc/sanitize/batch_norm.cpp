// source: csrc/common/cpu/capability.cpp
// source: csrc/batch_norm/cpu/kernels.cpp
// source: csrc/batch_norm/cpu/forward.cpp
// source: csrc/batch_norm/cpu/backward.cpp
//
// Random shapes in every dtype and instruction set, compared with a naive loop in
// double, and bit for bit over numbers of threads. Operands lie in heap blocks of their
// exact size: a read or write beyond them is reported.
#include "batch_norm/cpu/core.h"

#include "driver.h"

namespace {

// Values of four digits, which both dtypes hold exactly.
Entries filled(Dtype dtype, int64_t count) {
  Entries entries(dtype, count);
  for (int64_t i = 0; i < count; ++i)
    entries.set(i, static_cast<float>(draw(-15, 15)) / 8);
  return entries;
}

struct Case {
  BatchNormShape shape;
  bool relu, with_residual, affine;
  Entries input, residual, grad, weight, bias;

  Case(const BatchNormShape& s, bool cut, bool added, bool factors)
      : shape(s),
        relu(cut),
        with_residual(added),
        affine(factors),
        input(filled(s.dtype, total())),
        residual(filled(s.dtype, added ? total() : 0)),
        grad(filled(s.dtype, total())),
        weight(filled(Dtype::float32, factors ? s.channels : 0)),
        bias(filled(Dtype::float32, factors ? s.channels : 0)) {}

  int64_t total() const { return shape.count() * shape.channels; }
};

// What the two ops return.
struct Found {
  Entries output, mean, scale, grad_input, grad_residual, grad_weight, grad_bias;

  explicit Found(const Case& c)
      : output(c.shape.dtype, c.total()),
        mean(Dtype::float32, c.shape.channels),
        scale(Dtype::float32, c.shape.channels),
        grad_input(c.shape.dtype, c.total()),
        grad_residual(c.shape.dtype, c.with_residual ? c.total() : 0),
        grad_weight(Dtype::float32, c.shape.channels),
        grad_bias(Dtype::float32, c.shape.channels) {}

  std::vector<const Entries*> all() const {
    return {&output,        &mean,        &scale,    &grad_input,
            &grad_residual, &grad_weight, &grad_bias};
  }
};

constexpr double kEps = 0.01;

Found run(const Case& c, Capability capability, int number) {
  Found f(c);
  const cpu::batch_norm::Machine own{capability, on_threads(number), number};
  cpu::batch_norm::forward(
      {c.shape, c.input.data(), c.residual.data(), c.weight.floats(), c.bias.floats(),
       kEps, c.relu, f.output.data(), f.mean.floats(), f.scale.floats()},
      own);
  cpu::batch_norm::backward(
      {c.shape, c.grad.data(), c.input.data(), c.relu ? f.output.data() : nullptr,
       c.weight.floats(), f.mean.floats(), f.scale.floats(), f.grad_input.data(),
       f.grad_residual.data(), f.grad_weight.floats(), f.grad_bias.floats()},
      own);
  return f;
}

[[noreturn]] void fail(const Case& c, const char* what) {
  ::fail(
      "wrong %s: outer %ld channels %ld inner %ld dtype %d relu %d residual %d "
      "affine %d",
      what, long(c.shape.outer), long(c.shape.channels), long(c.shape.inner),
      int(c.shape.dtype), c.relu, c.with_residual, c.affine);
}

// The places of a channel's entries.
std::vector<int64_t> places(const BatchNormShape& s, int64_t channel) {
  std::vector<int64_t> all;
  for (int64_t a = 0; a < s.outer; ++a)
    for (int64_t b = 0; b < s.inner; ++b)
      all.push_back((a * s.channels + channel) * s.inner + b);
  return all;
}

void compare(const Case& c, const Found& f, int64_t channel) {
  const std::vector<int64_t> at = places(c.shape, channel);
  const double count = static_cast<double>(at.size());
  const double rounding = c.shape.dtype == Dtype::float32 ? 3e-5 : 0.02;
  const auto check = [&](double got, double want, double size, double bound,
                         const char* what) {
    if (!(std::fabs(got - want) <= bound * (std::fabs(want) + size))) fail(c, what);
  };
  double mean = 0, variance = 0;
  for (const int64_t i : at) mean += c.input.at(i) / count;
  for (const int64_t i : at) variance += std::pow(c.input.at(i) - mean, 2) / count;
  const double scale = 1 / std::sqrt(variance + kEps);
  check(f.mean.at(channel), mean, 1, 1e-6, "mean");
  check(f.scale.at(channel), scale, 0, 1e-5, "scale");
  const double weight = c.affine ? c.weight.at(channel) : 1;
  const double bias = c.affine ? c.bias.at(channel) : 0;
  double sum = 0, products = 0;
  const auto gradient = [&](int64_t i) {
    return c.relu && f.output.at(i) <= 0 ? 0 : c.grad.at(i);
  };
  for (const int64_t i : at) {
    const double x_hat = (c.input.at(i) - mean) * scale;
    const double y = x_hat * weight + bias + (c.with_residual ? c.residual.at(i) : 0);
    check(f.output.at(i), c.relu ? std::max(y, 0.) : y, scale, rounding, "output");
    if (c.with_residual && f.grad_residual.at(i) != gradient(i))
      fail(c, "grad_residual");
    sum += gradient(i), products += gradient(i) * x_hat;
  }
  check(f.grad_bias.at(channel), sum, count, 1e-6, "grad_bias");
  check(f.grad_weight.at(channel), products, count, 1e-5, "grad_weight");
  for (const int64_t i : at) {
    const double x_hat = (c.input.at(i) - mean) * scale;
    const double want =
        weight * scale * (gradient(i) - (sum + x_hat * products) / count);
    check(f.grad_input.at(i), want, scale * 2, rounding, "grad_input");
  }
}

void test(const BatchNormShape& shape) {
  const Case c(shape, draw(0, 1), draw(0, 1), draw(0, 1));
  for (const Capability capability : capabilities()) {
    const Found one = run(c, capability, 1), three = run(c, capability, 3);
    for (int64_t channel = 0; channel < shape.channels; ++channel)
      compare(c, one, channel);
    for (size_t i = 0; i < one.all().size(); ++i) {
      const Entries &a = *one.all()[i], &b = *three.all()[i];
      if (a.count && std::memcmp(a.data(), b.data(), a.count * a.bytes()))
        fail(c, "bits on three threads");
    }
  }
}

}  // namespace

int main() {
  for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16}) {
    for (int i = 0; i < cases(150); ++i)
      test({draw(1, 20), draw(1, 30), draw(1, draw(0, 1) ? 20 : 90), dtype});
    test({1, 20, 9001, dtype});  // long rows in pieces, a channel a task
    test({3, 2, 9001, dtype});   // a chunk a task
    test({300, 2, 100, dtype});  // several rows a chunk
    test({1500, 3, 1, dtype});   // columns, several chunks
    test({40, 1500, 2, dtype});  // wide ones
    test({1, 1, 1, dtype});
    test({1, 70, 1, dtype});
  }
  std::puts("batch_norm: all equal");
}
