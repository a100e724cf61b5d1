// Who does what. A task owns a few vectors of channels and takes all samples. Row by
// row of the output, and of the kernel, it adds the products of a row to the sums of
// the kernel's taps; where a group of samples ends these are G, and G and G * G are
// added to the task's moments. At the end of the task these are transposed and added to
// the accumulators.
//
// Memory traffic. Input and gradient are read in place: once from memory, and again for
// each row of the kernel from a cache. Taps outside of the image are left out. The
// accumulators are read and written once.
//
// Every element has one owner, and its additions have one order: results are equal bit
// for bit, whatever the number of threads.
#include "grad_moments/cpu/depthwise.h"

#include <algorithm>
#include <vector>

#include "common/cpu/floats.h"
#include "grad_moments/cpu/depthwise_kernels.h"
#include "grad_moments/cpu/inside.h"
#include "grad_moments/cpu/tuning.h"

namespace fisherprune::cpu::grad_moments {
namespace {

class Depthwise {
 public:
  Depthwise(const GradMoments& moments, const depthwise::Kernels& kernels,
            const Machine& machine);
  void run(int64_t vector) const;

 private:
  // Of one vector of channels, [tap][lane].
  struct Scratch {
    float* row;    // sums over some rows of the output
    float* group;  // over those of a group of samples before
    float *sum, *sum_sq;
  };

  void add_sample(int64_t sample, int64_t channel, const Scratch& own) const;
  void add_row(int64_t sample, int64_t channel, int64_t p, float* sums) const;
  void end_rows(const Scratch& own) const;
  void end_group(float scale, const Scratch& own) const;

  const GradMoments& moments_;
  const ConvShape& shape_;
  const depthwise::Kernels& kernels_;
  const Machine& machine_;
  const int64_t floats_;        // taps by lanes
  const int64_t bytes_;         // of an element
  std::vector<Inside> inside_;  // of each tap of a row of the kernel
};

Depthwise::Depthwise(const GradMoments& moments, const depthwise::Kernels& kernels,
                     const Machine& machine)
    : moments_(moments),
      shape_(moments.shape),
      kernels_(kernels),
      machine_(machine),
      floats_(shape_.patch() * kernels.lanes),
      bytes_(moments.input.dtype == Dtype::float32 ? 4 : 2) {
  for (int64_t x = 0; x < shape_.kernel_w; ++x)
    inside_.push_back(inside_of(x * shape_.dilation_w - shape_.pad_w, shape_.stride_w,
                                shape_.out_width, shape_.width));
}

void Depthwise::run(int64_t vector) const {
  const int64_t channel = vector * kernels_.lanes, taps = shape_.patch();
  float* const all = scratch_floats(4 * floats_);
  std::fill_n(all, 4 * floats_, 0.f);
  const Scratch own{all, all + floats_, all + 2 * floats_, all + 3 * floats_};
  const int64_t samples = shape_.samples, size = std::min(shape_.group_size, samples);
  for (int64_t n = 0; n < samples; ++n) {
    add_sample(n, channel, own);
    if ((n + 1) % size == 0 || n + 1 == samples)
      end_group(1.f / static_cast<float>(n % size + 1), own);
  }
  machine_.kernels.add_transposed(own.sum, kernels_.lanes, taps, kernels_.lanes,
                                  moments_.sum + channel * taps, taps);
  machine_.kernels.add_transposed(own.sum_sq, kernels_.lanes, taps, kernels_.lanes,
                                  moments_.sum_sq + channel * taps, taps);
}

void Depthwise::add_sample(int64_t sample, int64_t channel, const Scratch& own) const {
  const int64_t rows = std::max<int64_t>(1, tuning::kRunPositions / shape_.out_width);
  for (int64_t p = 0; p < shape_.out_height; ++p) {
    add_row(sample, channel, p, own.row);
    if ((p + 1) % rows == 0 || p + 1 == shape_.out_height) end_rows(own);
  }
}

// One row of the output meets some rows of the image.
void Depthwise::add_row(int64_t sample, int64_t channel, int64_t p, float* sums) const {
  const ConvShape& s = shape_;
  const int64_t *a = moments_.input.stride, *d = moments_.grad.stride;
  const auto element = [&](const View4& view, int64_t index) {
    return static_cast<const char*>(view.data) + index * bytes_;
  };
  const void* const grad =
      element(moments_.grad, sample * d[0] + channel * d[1] + p * d[2]);
  for (int64_t y = 0; y < s.kernel_h; ++y, sums += s.kernel_w * kernels_.lanes) {
    const int64_t h = p * s.stride_h - s.pad_h + y * s.dilation_h;
    if (h < 0 || h >= s.height) continue;
    const int64_t first = sample * a[0] + channel * a[1] + h * a[2] - s.pad_w * a[3];
    kernels_.add_row[static_cast<int>(moments_.input.dtype)](
        {element(moments_.input, first), grad, s.stride_w * a[3], s.dilation_w * a[3],
         d[3], s.kernel_w, inside_.data()},
        sums);
  }
}

void Depthwise::end_rows(const Scratch& own) const {
  for (int64_t i = 0; i < floats_; ++i) own.group[i] += own.row[i], own.row[i] = 0.f;
}

void Depthwise::end_group(float scale, const Scratch& own) const {
  for (int64_t i = 0; i < floats_; ++i) {
    const float g = own.group[i] * scale;
    own.sum[i] += g;
    own.sum_sq[i] += g * g;
    own.group[i] = 0.f;
  }
}

}  // namespace

int64_t depthwise_channels(const GradMoments& m, Capability capability) {
  const ConvShape& s = m.shape;
  const bool possible = s.groups == s.channels && s.outputs == s.channels &&
                        m.input.stride[1] == 1 && m.grad.stride[1] == 1 &&
                        m.input.dtype == m.grad.dtype;
  const int64_t lanes = depthwise::kernels(capability).lanes;
  return possible ? s.channels / lanes * lanes : 0;
}

void accumulate_depthwise(const GradMoments& moments, Capability capability,
                          const Machine& machine) {
  const depthwise::Kernels& kernels = depthwise::kernels(capability);
  const int64_t channels = depthwise_channels(moments, capability);
  const Depthwise depthwise(moments, kernels, machine);
  for_each_task(machine.parallel, channels / kernels.lanes,
                [&](int64_t vector) { depthwise.run(vector); });
}

}  // namespace fisherprune::cpu::grad_moments
