// Pairs of bfloat16 numbers that lie side by side in memory, as words; no guard,
// because the body that includes it after entries_body.h is compiled once for each set
// of vector instructions. Widening a number is a shift or a mask: the lower half of a
// word is the first number of its pair.

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "pairs of bfloat16 are read as words of a little-endian processor");

typedef Words WordsInMemory __attribute__((aligned(2), may_alias));

FISHERPRUNE_TARGET FISHERPRUNE_INLINE Words load_words(const void* from) {
  return *static_cast<const WordsInMemory*>(from);
}

FISHERPRUNE_TARGET FISHERPRUNE_INLINE void store_words(void* to, Words words) {
  *static_cast<WordsInMemory*>(to) = words;
}

FISHERPRUNE_TARGET FISHERPRUNE_INLINE Vec first_of(Words pairs) {
  return reinterpret_cast<Vec>(pairs << 16);
}

FISHERPRUNE_TARGET FISHERPRUNE_INLINE Vec second_of(Words pairs) {
  return reinterpret_cast<Vec>(pairs & 0xffff0000u);
}

// The pairs of two rounded vectors.
FISHERPRUNE_TARGET FISHERPRUNE_INLINE Words paired(Vec first, Vec second) {
  return (rounded(first) >> 16) | (rounded(second) & 0xffff0000u);
}

// A square of words from the rows of a matrix.
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void load_square(const float* from,
                                                       int64_t stride,
                                                       Vec (&square)[kLanes]) {
  FISHERPRUNE_UNROLL
  for (int i = 0; i < kLanes; ++i) square[i] = load(from + i * stride);
}

// The same whose row i has pairs of the rows 2 * i and 2 * i + 1: transposed, it has
// rows of as many columns.
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void load_square(const BFloat16* from,
                                                       int64_t stride,
                                                       Vec (&square)[kLanes]) {
  FISHERPRUNE_UNROLL
  for (int i = 0; i < kLanes; ++i) {
    Words row[2];
    for (int k = 0; k < 2; ++k) {
      const BFloat16* const entries = from + (2 * i + k) * stride;
      row[k] = __builtin_convertvector(
          *reinterpret_cast<const HalvesInMemory*>(entries), Words);
    }
    square[i] = reinterpret_cast<Vec>(row[0] | row[1] << 16);
  }
}
