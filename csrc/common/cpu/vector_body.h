// Vectors in one set of vector instructions: what the bodies of all kernels begin with;
// no guard, because each of them is compiled once for each set, with these macros:
//   FISHERPRUNE_TARGET  function attribute that switches the instructions on
//   FISHERPRUNE_LANES   floats of one vector
//   FISHERPRUNE_WIDE    whether there are 32 vector registers instead of 16

constexpr int kLanes = FISHERPRUNE_LANES;

typedef float Vec __attribute__((vector_size(4 * FISHERPRUNE_LANES)));
// As it lies in memory: any address.
typedef float VecInMemory
    __attribute__((vector_size(4 * FISHERPRUNE_LANES), aligned(4), may_alias));

FISHERPRUNE_TARGET FISHERPRUNE_INLINE Vec load(const float* from) {
  return *reinterpret_cast<const VecInMemory*>(from);
}

FISHERPRUNE_TARGET FISHERPRUNE_INLINE void store(float* to, Vec value) {
  *reinterpret_cast<VecInMemory*>(to) = value;
}

// The first and the second half of a[0], b[0], a[1], b[1], ...
FISHERPRUNE_TARGET FISHERPRUNE_INLINE Vec zip_low(Vec a, Vec b) {
#if FISHERPRUNE_LANES == 16
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22,
                                 7, 23);
#elif FISHERPRUNE_LANES == 8
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}

FISHERPRUNE_TARGET FISHERPRUNE_INLINE Vec zip_high(Vec a, Vec b) {
#if FISHERPRUNE_LANES == 16
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14,
                                 30, 15, 31);
#elif FISHERPRUNE_LANES == 8
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// Every second entry of a and b, from a[0] and b[1] on.
FISHERPRUNE_TARGET FISHERPRUNE_INLINE Vec every_second(Vec a, Vec b) {
#if FISHERPRUNE_LANES == 16
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25,
                                 27, 29, 31);
#elif FISHERPRUNE_LANES == 8
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 9, 11, 13, 15);
#else
  return __builtin_shufflevector(a, b, 0, 2, 5, 7);
#endif
}

// Transposes a square of vectors: each of the log2(lanes) rounds zips row i with row
// i + lanes / 2.
template <int kRounds = kLanes>
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void transpose_square(Vec (&x)[kLanes]) {
  if constexpr (kRounds > 1) {
    Vec y[kLanes];
    FISHERPRUNE_UNROLL
    for (int i = 0; i < kLanes / 2; ++i) {
      y[2 * i] = zip_low(x[i], x[i + kLanes / 2]);
      y[2 * i + 1] = zip_high(x[i], x[i + kLanes / 2]);
    }
    FISHERPRUNE_UNROLL
    for (int i = 0; i < kLanes; ++i) x[i] = y[i];
    transpose_square<kRounds / 2>(x);
  }
}
