// global_topk: the contract, free of torch so that tests can compile the kernels alone.
//
// Which entries are kept: over all score tensors taken together, in order, exactly the
// k largest; of entries that equal the k-th largest, those of the lowest flat index. +0
// and -0 are equal. The result is one bool mask per tensor, never a list of indices,
// and the threshold, which is the k-th largest value. Of further ranks the caller gets
// the thresholds alone: no masks are written for them. NaN and infinities are counted
// per tensor. The caller must refuse them: the masks are then unspecified.
//
// The selection works on keys: integers in the same order as the floats. So no
// floating-point mode, such as flushed denormals, changes it. A GPU selects digit by
// digit, from the most significant one down: a histogram of one digit of all keys, then
// a decision. The CPU collects the few entries of a sampled bracket. The op
// topk_histogram counts one digit of the keys that begin with a prefix: as the decision
// is another step, the histograms of several devices can be added.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/integers.h"

namespace fisherprune {

struct Scores {
  const float* data;
  int64_t size;
};

// a < b as floats exactly when key(a) < key(b); key(-0) == key(+0).
FISHERPRUNE_HOST_DEVICE inline uint32_t key_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits & 0x80000000u ? 0u - bits : bits | 0x80000000u;
}

FISHERPRUNE_HOST_DEVICE inline float value_of(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : 0u - key;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace fisherprune
