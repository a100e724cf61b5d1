// Where there is a residual the first pass writes its gradient, the one behind the
// relu; the second pass reads that, and no output.
#include "batch_norm/cpu/passes.h"

namespace fisherprune::cpu::batch_norm {
namespace {

// The sums of x - mean say what rounding took from the float mean.
void settle(const BatchNormBackward& norm, int64_t channel, Passes& passes) {
  double sum = 0, products = 0, deviations = 0;
  passes.for_sums(channel, [&](int64_t, const Sums& s) {
    sum += *s.of[0], products += *s.of[1], deviations += *s.of[2];
  });
  const double count = static_cast<double>(norm.shape.count());
  const double low = deviations / count, scale = norm.scale[channel];
  const double grad_weight = scale * (products - low * sum);
  norm.grad_bias[channel] = static_cast<float>(sum);
  norm.grad_weight[channel] = static_cast<float>(grad_weight);
  const double factor = norm.weight ? scale * norm.weight[channel] : scale;
  const double slope = -factor * scale * grad_weight / count;
  passes.set(1, channel, static_cast<float>(factor));
  passes.set(2, channel, static_cast<float>(slope));
  passes.set(3, channel, static_cast<float>(-factor * sum / count - slope * low));
}

}  // namespace

void backward(const BatchNormBackward& norm, const Machine& machine) {
  Passes passes(norm.shape, machine);
  const Chunks& chunks = passes.chunks;
  const int kind = passes.kind, dtype = passes.dtype;
  for (int64_t c = 0; c < norm.shape.channels; ++c) passes.set(0, c, norm.mean[c]);
  passes.run(
      [&](int64_t unit, int64_t chunk) {
        const int64_t at = chunks.at(unit, chunk);
        const Operands operands{from(norm.grad, at, dtype), from(norm.input, at, dtype),
                                from(norm.output, at, dtype),
                                from(norm.grad_residual, at, dtype), false};
        passes.table.reduce[kind][dtype](operands, chunks.block(chunk),
                                         passes.coefficients(unit),
                                         passes.sums(unit, chunk));
      },
      [&](int64_t channel) { settle(norm, channel, passes); },
      [&](int64_t unit, int64_t chunk) {
        const int64_t at = chunks.at(unit, chunk);
        const bool kept = norm.grad_residual != nullptr;
        const Operands operands{from(kept ? norm.grad_residual : norm.grad, at, dtype),
                                from(norm.input, at, dtype),
                                kept ? nullptr : from(norm.output, at, dtype),
                                from(norm.grad_input, at, dtype), false};
        passes.table.differentiate[kind][dtype](operands, chunks.block(chunk),
                                                passes.coefficients(unit));
      });
}

}  // namespace fisherprune::cpu::batch_norm
