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

// Memory that a thread keeps for its next call: to get new pages from the system takes
// as long as to compute what fills them.
class KeptFloats {
 public:
  float* at_least(int64_t count) {
    if (count > size_) {
      kept_ = nullptr, size_ = 0;
      kept_ = new_floats(count);
      size_ = count;
    }
    return kept_.get();
  }

 private:
  Floats kept_;
  int64_t size_ = 0;
};

// Scratch memory of the calling thread. All callers share it: nobody may ask again
// while it is in use.
inline float* scratch_floats(int64_t count) {
  thread_local KeptFloats kept;
  return kept.at_least(count);
}

// The same, apart from it: for what the tasks of a call read, while each has scratch
// memory of its own.
inline float* shared_floats(int64_t count) {
  thread_local KeptFloats kept;
  return kept.at_least(count);
}

}  // namespace fisherprune::cpu
