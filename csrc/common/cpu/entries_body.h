// Entries of float32 or bfloat16 as vectors of float; no guard, because the body that
// includes it after vector_body.h is compiled once for each set of vector instructions.

typedef uint32_t Words __attribute__((vector_size(4 * FISHERPRUNE_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * FISHERPRUNE_LANES)));
typedef Halves HalvesInMemory __attribute__((aligned(2), may_alias));

FISHERPRUNE_TARGET FISHERPRUNE_INLINE Vec load_all(const float* from) {
  return load(from);
}

FISHERPRUNE_TARGET FISHERPRUNE_INLINE Vec load_all(const BFloat16* from) {
  const Halves halves = *reinterpret_cast<const HalvesInMemory*>(from);
  return reinterpret_cast<Vec>(__builtin_convertvector(halves, Words) << 16);
}

FISHERPRUNE_TARGET FISHERPRUNE_INLINE void store_all(float* to, Vec value) {
  store(to, value);
}

// The nearest bfloat16 numbers, ties to even, in the upper halves of the words; what is
// no number stays none. The lower halves mean nothing.
FISHERPRUNE_TARGET FISHERPRUNE_INLINE Words rounded(Vec value) {
  const Words bits = reinterpret_cast<Words>(value);
  return value == value ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
}

FISHERPRUNE_TARGET FISHERPRUNE_INLINE void store_all(BFloat16* to, Vec value) {
  *reinterpret_cast<HalvesInMemory*>(to) =
      __builtin_convertvector(rounded(value) >> 16, Halves);
}

// The first n entries, zero in the lanes behind them.
template <class T>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE Vec load_some(const T* from, int64_t n) {
  if (n >= kLanes) return load_all(from);
  T some[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) some[i] = from[i];
  return load_all(some);
}

template <class T>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void store_some(T* to, Vec value, int64_t n) {
  if (n >= kLanes) return store_all(to, value);
  T some[kLanes];
  store_all(some, value);
  for (int64_t i = 0; i < n; ++i) to[i] = some[i];
}

// The first n lanes, zero behind them.
FISHERPRUNE_TARGET FISHERPRUNE_INLINE Vec first_lanes(Vec value, int64_t n) {
  if (n >= kLanes) return value;
  float lanes[kLanes];
  store(lanes, value);
  return load_some(lanes, n);
}

FISHERPRUNE_TARGET FISHERPRUNE_INLINE Vec all_lanes(float value) {
  return value - Vec{};  // -0 stays -0
}

FISHERPRUNE_TARGET FISHERPRUNE_INLINE float sum_of_lanes(Vec value) {
  float lanes[kLanes];
  store(lanes, value);
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return static_cast<float>(sum);
}
