// What the machine can do at best, for percent of roofline: independent multiply-adds in registers,
// and reading memory. Compiled at run time with -march=native; one call runs in one thread.
//
// The accumulators are named, not an array: an array is spilled. They start from different values:
// equal ones would be merged into one.
#include <stddef.h>
#include <stdint.h>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif

typedef float floats __attribute__((vector_size(BYTES)));
typedef uint64_t words __attribute__((vector_size(BYTES)));

// Enough chains to hide a latency of 4 cycles at 2 per cycle, within 16 registers where there are
// only 16.
#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
#define CHAINS 12

// Returns the floating-point operations done.
double probe_float32(int64_t iterations, volatile float* sink) {
  const floats a = (floats){} + 0.999f + sink[0], b = (floats){} + 0.001f;
#define START(i) floats c##i = (floats){} + (float)i;
  EACH(START)
  for (int64_t n = 0; n < iterations; ++n) {
#define STEP(i) c##i = c##i * a + b;
    EACH(STEP)
  }
  floats sum = {};
#define ADD(i) sum += c##i;
  EACH(ADD)
  sink[0] = 0.0f * sum[0];
  return 2.0 * CHAINS * (BYTES / sizeof(float)) * (double)iterations;
}

// The same with the bf16 dot product; 0 where the machine has none.
double probe_bfloat16(int64_t iterations, volatile float* sink) {
#if defined(__AVX512BF16__)
  const __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1.0f + sink[0]), _mm512_set1_ps(0.5f));
#define START_DOT(i) __m512 d##i = _mm512_set1_ps((float)i);
  EACH(START_DOT)
  for (int64_t n = 0; n < iterations; ++n) {
#define DOT(i) d##i = _mm512_dpbf16_ps(d##i, a, a);
    EACH(DOT)
  }
  __m512 sum = _mm512_setzero_ps();
#define ADD_DOT(i) sum = _mm512_add_ps(sum, d##i);
  EACH(ADD_DOT)
  sink[0] = 0.0f * _mm512_cvtss_f32(sum);
  return 4.0 * CHAINS * 16 * (double)iterations;
#else
  (void)iterations;
  (void)sink;
  return 0.0;
#endif
}

// Reads some bytes, a multiple of 1024 and aligned to 64; returns a value that depends on each.
uint64_t probe_read(const void* data, size_t bytes) {
  const words *at = data, *const end = (const words*)((const char*)data + bytes);
  words s0 = {}, s1 = {}, s2 = {}, s3 = {};
  for (; at < end; at += 4) {
    s0 ^= at[0];
    s1 ^= at[1];
    s2 ^= at[2];
    s3 ^= at[3];
  }
  s0 ^= s1 ^ s2 ^ s3;
  return s0[0];
}
