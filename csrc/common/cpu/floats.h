// Scratch memory aligned to cache lines, not initialized.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace fisherprune::cpu {

constexpr std::align_val_t kLineBytes{64};

struct FreeFloats {
  void operator()(float* p) const { ::operator delete(p, kLineBytes); }
};

using Floats = std::unique_ptr<float[], FreeFloats>;

inline Floats new_floats(int64_t count) {
  return Floats(static_cast<float*>(::operator new(count * sizeof(float), kLineBytes)));
}

// Scratch memory of the calling thread. The thread keeps it for the next call: to get
// new pages from the system takes as long as to compute what fills them. All callers
// share this memory: nobody may ask again while it is in use.
inline float* scratch_floats(int64_t count) {
  thread_local Floats kept;
  thread_local int64_t size = 0;
  if (count > size) {
    kept = nullptr, size = 0;
    kept = new_floats(count);
    size = count;
  }
  return kept.get();
}

}  // namespace fisherprune::cpu
