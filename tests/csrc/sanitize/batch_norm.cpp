// source: csrc/common/cpu/capability.cpp
// source: csrc/batch_norm/cpu/kernels.cpp
// source: csrc/batch_norm/cpu/forward.cpp
// source: csrc/batch_norm/cpu/backward.cpp
//
// Random shapes in every dtype and instruction set, compared with a naive loop in
// double, and bit for bit over numbers of threads. Operands lie in heap blocks of their
// exact size: a read or write beyond them is reported.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "batch_norm/cpu/core.h"
#include "common/cpu/half_float.h"

namespace {

using namespace fisherprune;
using namespace fisherprune::cpu;
using batch_norm::Machine;

std::mt19937 generator(21);

int64_t draw(int64_t least, int64_t most) {
  return std::uniform_int_distribution<int64_t>(least, most)(generator);
}

// Entries of a dtype, or of channels; null where `count` is 0.
struct Values {
  Dtype dtype;
  int64_t count;
  std::unique_ptr<char[]> memory;

  Values(Dtype type, int64_t n)
      : dtype(type), count(n), memory(n ? new char[n * bytes()] : nullptr) {}

  int64_t bytes() const { return dtype == Dtype::float32 ? 4 : 2; }
  void* data() const { return memory.get(); }
  float* floats() const { return reinterpret_cast<float*>(memory.get()); }

  double at(int64_t i) const {
    if (dtype == Dtype::float32) return floats()[i];
    return to_float(reinterpret_cast<const BFloat16*>(memory.get())[i]);
  }

  // Values of four digits, which both dtypes hold exactly.
  void fill() {
    for (int64_t i = 0; i < count; ++i) {
      const float value = static_cast<float>(draw(-15, 15)) / 8;
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      if (dtype != Dtype::float32) bits >>= 16;
      std::memcpy(memory.get() + i * bytes(), &bits, bytes());
    }
  }
};

Values filled(Dtype dtype, int64_t count) {
  Values values(dtype, count);
  values.fill();
  return values;
}

Machine machine(Capability capability, int threads) {
  const auto parallel = [threads](int64_t count, const Body& body) {
    std::vector<std::thread> running;
    for (int t = 0; t < threads; ++t)
      running.emplace_back(body, count * t / threads, count * (t + 1) / threads);
    for (std::thread& t : running) t.join();
  };
  return {capability, parallel, threads};
}

struct Case {
  BatchNormShape shape;
  bool relu, with_residual, affine;
  Values input, residual, grad, weight, bias;

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
  Values output, mean, scale, grad_input, grad_residual, grad_weight, grad_bias;

  explicit Found(const Case& c)
      : output(c.shape.dtype, c.total()),
        mean(Dtype::float32, c.shape.channels),
        scale(Dtype::float32, c.shape.channels),
        grad_input(c.shape.dtype, c.total()),
        grad_residual(c.shape.dtype, c.with_residual ? c.total() : 0),
        grad_weight(Dtype::float32, c.shape.channels),
        grad_bias(Dtype::float32, c.shape.channels) {}

  std::vector<const Values*> all() const {
    return {&output,        &mean,        &scale,    &grad_input,
            &grad_residual, &grad_weight, &grad_bias};
  }
};

constexpr double kEps = 0.01;

Found run(const Case& c, Capability capability, int threads) {
  Found f(c);
  const Machine own = machine(capability, threads);
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
  std::printf(
      "wrong %s: outer %ld channels %ld inner %ld dtype %d relu %d residual %d "
      "affine %d\n",
      what, long(c.shape.outer), long(c.shape.channels), long(c.shape.inner),
      int(c.shape.dtype), c.relu, c.with_residual, c.affine);
  std::exit(1);
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
  for (const Capability capability :
       {Capability::portable, Capability::avx2, Capability::avx512}) {
    if (capability > cpu_capability()) continue;
    const Found one = run(c, capability, 1), three = run(c, capability, 3);
    for (int64_t channel = 0; channel < shape.channels; ++channel)
      compare(c, one, channel);
    for (size_t i = 0; i < one.all().size(); ++i) {
      const Values &a = *one.all()[i], &b = *three.all()[i];
      if (a.count && std::memcmp(a.data(), b.data(), a.count * a.bytes()))
        fail(c, "bits on three threads");
    }
  }
}

}  // namespace

int main() {
  for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16}) {
    for (int i = 0; i < 150; ++i)
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
