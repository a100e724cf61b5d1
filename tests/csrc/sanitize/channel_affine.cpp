// source: csrc/common/cpu/capability.cpp
// source: csrc/channel_affine/cpu/kernels.cpp
//
// Random sizes in every instruction set, compared with a naive loop. Operands lie in
// heap blocks of their exact size: a read or write beyond them is reported.
#include "channel_affine/cpu/kernels.h"

#include "driver.h"

namespace {

void compare(double found, double wanted, double size, const char* what) {
  if (std::abs(found - wanted) <= 1e-5 * (1 + size)) return;
  fail("channel_affine: wrong %s: %g, not %g", what, found, wanted);
}

void check(const ChannelAffineBackward& a) {
  for (int64_t row = 0; row < a.samples * a.channels; ++row) {
    const int64_t c = row % a.channels;
    double product = 0, sum = 0, size = 0;
    for (int64_t p = 0; p < a.positions; ++p) {
      const int64_t sample = row / a.channels;
      const int64_t at = a.channels_last ? (sample * a.positions + p) * a.channels + c
                                         : row * a.positions + p;
      const double d = a.grad[at], x = double(a.input[at]) - a.mean[c];
      product += d * x * a.scale[c], sum += d;
      size += std::abs(d) + std::abs(d * x * a.scale[c]);
      compare(a.input_grad[at], d * a.factor[c], std::abs(d), "input_grad");
    }
    compare(a.weight_grad[row], product, size, "weight_grad");
    compare(a.bias_grad[row], sum, size, "bias_grad");
  }
}

void test(int64_t samples, int64_t channels, int64_t positions, bool last) {
  const int64_t rows = samples * channels, all = rows * positions;
  const Block grad = drawn(all), input = drawn(all), mean = drawn(channels),
              scale = drawn(channels), factor = drawn(channels);
  for (const Capability capability : capabilities()) {
    const Block input_grad = empty(all), weight_grad = empty(rows),
                bias_grad = empty(rows);
    const ChannelAffineBackward call{
        samples,      channels,         positions,         last,
        grad.get(),   input.get(),      mean.get(),        scale.get(),
        factor.get(), input_grad.get(), weight_grad.get(), bias_grad.get()};
    channel_affine::run(call, capability, two_threads);
    check(call);
  }
}

}  // namespace

int main() {
  for (int i = 0; i < cases(300); ++i)
    test(draw(0, 5), draw(1, i % 3 ? 40 : 200), draw(0, 70), i % 2);
  for (const bool last : {false, true}) {
    test(3, 5, 5000, last);
    test(40, 300, 4, last);
    test(40, 260, 100, last);  // the last vector begins before the last block of 64
  }
  std::puts("channel_affine: all right");
}
