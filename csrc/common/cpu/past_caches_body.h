// Stores past the caches; no guard, because the body that includes it after
// vector_body.h is compiled once for each set of vector instructions. The file that
// compiles the body includes <immintrin.h> on x86.

// Stores a line past the caches, if it is one vector: no line is read before it is
// written. The line begins at a multiple of its length.
FISHERPRUNE_TARGET FISHERPRUNE_INLINE void store_past(float* to, Vec value) {
#if FISHERPRUNE_LANES == 16
  _mm512_stream_ps(to, reinterpret_cast<__m512>(value));
#else
  store(to, value);
#endif
}

// Waits until what went past the caches is in memory.
FISHERPRUNE_TARGET inline void drain() {
#if FISHERPRUNE_LANES == 16
  _mm_sfence();
#endif
}
