// 16-bit floats are converted by their bits: exact, without torch, and in a way that
// the compiler vectorizes in loops.
#pragma once

#include <cstdint>
#include <cstring>

namespace fisherprune::cpu {

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) {
  return float_of_bits(static_cast<uint32_t>(value.bits) << 16);
}

// The nearest, ties to even; what is no number stays none.
inline BFloat16 to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const bool is_number = (bits & 0x7fffffffu) <= 0x7f800000u;
  return {static_cast<uint16_t>((is_number ? rounded : bits | 0x400000u) >> 16)};
}

inline float to_float(Float16 value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t rebias = (127 - 15) << 23;
  uint32_t bits = (magnitude << 13) + rebias;
  if (magnitude >= 0x7c00u) bits += rebias;  // infinity and NaN
  if (magnitude < 0x0400u) {
    // Below the normal range: the magnitude counts steps of 2^-24.
    const float exact = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
    std::memcpy(&bits, &exact, sizeof bits);
  }
  return float_of_bits(bits | sign);
}

}  // namespace fisherprune::cpu
