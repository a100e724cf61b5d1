// Chunks are measured about a mean of their own, while they are in the first cache, and
// put together by Chan's formula: no mean is too large for the variance.
#include <cmath>

#include "batch_norm/cpu/passes.h"

namespace fisherprune::cpu::batch_norm {
namespace {

struct Moments {
  double count = 0, mean = 0, squares = 0;  // (x - mean)^2

  void add(double n, double shift, double sum, double about) {
    const double own = shift + sum / n, delta = own - mean, all = count + n;
    squares += about - sum * sum / n + delta * delta * count * n / all;
    mean += delta * n / all;
    count = all;
  }
};

// What rounding took from the float mean goes into the last coefficient.
void settle(const BatchNorm& norm, int64_t channel, Passes& passes) {
  Moments m;
  passes.for_sums(channel, [&](int64_t entries, const Sums& s) {
    m.add(static_cast<double>(entries), *s.of[0], *s.of[1], *s.of[2]);
  });
  const double variance = m.squares < 0 ? 0 : m.squares / m.count;
  const double scale = 1 / std::sqrt(variance + norm.eps);
  const float mean = static_cast<float>(m.mean);
  const double factor = norm.weight ? scale * norm.weight[channel] : scale;
  const double bias = norm.bias ? norm.bias[channel] : 0;
  norm.mean[channel] = mean;
  norm.scale[channel] = static_cast<float>(scale);
  passes.set(0, channel, mean);
  passes.set(1, channel, static_cast<float>(factor));
  passes.set(2, channel, static_cast<float>(bias - (m.mean - mean) * factor));
}

}  // namespace

void forward(const BatchNorm& norm, const Machine& machine) {
  Passes passes(norm.shape, machine);
  const Chunks& chunks = passes.chunks;
  const int dtype = passes.dtype;
  const auto operands = [&](int64_t at) {
    return Operands{nullptr, from(norm.input, at, dtype),
                    from(norm.residual, at, dtype), from(norm.output, at, dtype),
                    norm.relu};
  };
  passes.run(
      [&](int64_t unit, int64_t chunk) {
        passes.table.measure[passes.kind][dtype](operands(chunks.at(unit, chunk)),
                                                 chunks.block(chunk),
                                                 passes.sums(unit, chunk));
      },
      [&](int64_t channel) { settle(norm, channel, passes); },
      [&](int64_t unit, int64_t chunk) {
        passes.table.normalize[passes.kind][dtype](operands(chunks.at(unit, chunk)),
                                                   chunks.block(chunk),
                                                   passes.coefficients(unit));
      });
}

}  // namespace fisherprune::cpu::batch_norm
