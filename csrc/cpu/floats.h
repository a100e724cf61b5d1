// Scratch memory aligned to cache lines, not initialized.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace fisherprune {

constexpr std::align_val_t kLineBytes{64};

struct FreeFloats {
  void operator()(float* p) const { ::operator delete(p, kLineBytes); }
};

using Floats = std::unique_ptr<float[], FreeFloats>;

inline Floats new_floats(int64_t count) {
  return Floats(static_cast<float*>(::operator new(count * sizeof(float), kLineBytes)));
}

}  // namespace fisherprune
