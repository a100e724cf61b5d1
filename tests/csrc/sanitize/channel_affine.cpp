// source: csrc/common/cpu/capability.cpp
// source: csrc/channel_affine/cpu/kernels.cpp
//
// Random sizes in every instruction set, compared with a naive loop. Operands lie in
// heap blocks of their exact size: a read or write beyond them is reported.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>

#include "channel_affine/cpu/kernels.h"

namespace {

using namespace fisherprune;
using namespace fisherprune::cpu;

std::mt19937 generator(23);

int64_t draw(int64_t least, int64_t most) {
  return std::uniform_int_distribution<int64_t>(least, most)(generator);
}

void two_threads(int64_t count, const Body& body) {
  std::thread other(body, 0, count / 2);
  body(count / 2, count);
  other.join();
}

using Block = std::unique_ptr<float[]>;

Block drawn(int64_t count) {
  std::normal_distribution<float> normal;
  Block block(new float[count]);
  for (int64_t i = 0; i < count; ++i) block[i] = normal(generator);
  return block;
}

void compare(double found, double wanted, double size, const char* what) {
  if (std::abs(found - wanted) <= 1e-5 * (1 + size)) return;
  std::printf("channel_affine: wrong %s: %g, not %g\n", what, found, wanted);
  std::exit(1);
}

void check(const ChannelAffineBackward& a) {
  for (int64_t row = 0; row < a.samples * a.channels; ++row) {
    const int64_t c = row % a.channels;
    double product = 0, sum = 0, size = 0;
    for (int64_t p = 0; p < a.positions; ++p) {
      const int64_t at = row * a.positions + p;
      const double d = a.grad[at], x = double(a.input[at]) - a.mean[c];
      product += d * x * a.scale[c], sum += d;
      size += std::abs(d) + std::abs(d * x * a.scale[c]);
      compare(a.input_grad[at], d * a.factor[c], std::abs(d), "input_grad");
    }
    compare(a.weight_grad[row], product, size, "weight_grad");
    compare(a.bias_grad[row], sum, size, "bias_grad");
  }
}

void test(int64_t samples, int64_t channels, int64_t positions) {
  const int64_t rows = samples * channels, all = rows * positions;
  const Block grad = drawn(all), input = drawn(all), mean = drawn(channels),
              scale = drawn(channels), factor = drawn(channels);
  for (const Capability capability :
       {Capability::portable, Capability::avx2, Capability::avx512}) {
    if (capability > cpu_capability()) continue;
    const Block input_grad(new float[all]), weight_grad(new float[rows]),
        bias_grad(new float[rows]);
    const ChannelAffineBackward call{
        samples,          channels,          positions,      grad.get(),
        input.get(),      mean.get(),        scale.get(),    factor.get(),
        input_grad.get(), weight_grad.get(), bias_grad.get()};
    channel_affine::run(call, capability, two_threads);
    check(call);
  }
}

}  // namespace

int main() {
  for (int i = 0; i < 200; ++i) test(draw(0, 5), draw(1, 40), draw(0, 70));
  test(3, 5, 5000);
  test(40, 300, 4);
  std::puts("channel_affine: all right");
}
