// The vocabulary that kernel bodies are written in: vectors of FT_LANES floats.
//   load(p, n), store(p, v, n)   the first n lanes, n <= kLanes, of any dtype; the rest 0,
//   unwritten select(v, bits)              v where the lane's bit is set, else 0, whatever v holds
//   there transpose(v)                 of kLanes vectors as a square matrix load_pairs, zip_pairs
//   lanes that hold two bf16 values, for dot_pairs
// Subnormals are kept, except by dot_pairs: vdpbf16ps takes and gives them as zeros.
namespace {

constexpr int kLanes = FT_LANES;
constexpr uint32_t kAllLanes = uint32_t((uint64_t(1) << kLanes) - 1);

#define FT_INLINE inline __attribute__((always_inline))

// The address sanitizer does not see masked loads and stores: it is shown both ends of what they
// reach.
template <class T>
FT_INLINE void show(const T* p, int n) {
#if defined(__SANITIZE_ADDRESS__)
  if (n <= 0) return;
  const volatile char* bytes = reinterpret_cast<const volatile char*>(p);
  (void)bytes[0];
  (void)bytes[n * int(sizeof(T)) - 1];
#else
  (void)p;
  (void)n;
#endif
}

#if FT_LANES == 16

using Vec = __m512;

FT_INLINE __mmask16 first_lanes(int n) { return __mmask16((1u << n) - 1); }

FT_INLINE Vec zero() { return _mm512_setzero_ps(); }
FT_INLINE Vec splat(float x) { return _mm512_set1_ps(x); }
FT_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
FT_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
FT_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
FT_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
FT_INLINE Vec sub_product(Vec c, Vec a, Vec b) { return _mm512_fnmadd_ps(a, b, c); }
// With one value for all lanes. As an operand in memory it is spread where it is loaded; by an
// instruction of its own, which compilers prefer, it takes the pipes that shuffle.
FT_INLINE Vec fma(const float* a, Vec b, Vec c) {
  asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(b), "m"(*a));
  return c;
}

FT_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
FT_INLINE Vec load(const float* p, int n) {
  show(p, n);
  return _mm512_maskz_loadu_ps(first_lanes(n), p);
}
template <class T>
FT_INLINE __m512i load_halves(const T* p, int n) {
  show(p, n);
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
FT_INLINE Vec load(const bf16* p, int n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(load_halves(p, n), 16));
}
FT_INLINE Vec load(const fp16* p, int n) {
  show(p, n);
  const __m256i halves = _mm256_maskz_loadu_epi16(first_lanes(n), p);
  return _mm512_maskz_cvtph_ps(first_lanes(n), halves);
}

FT_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
FT_INLINE void store(float* p, Vec v, int n) {
  show(p, n);
  _mm512_mask_storeu_ps(p, first_lanes(n), v);
}
FT_INLINE void store(bf16* p, Vec v, int n) {
  show(p, n);
  const __m512i u = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i even = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
  const __m512i bits = _mm512_srli_epi32(_mm512_mask_mov_epi32(even, nan, quiet), 16);
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtepi32_epi16(bits));
}
FT_INLINE void store(fp16* p, Vec v, int n) {
  show(p, n);
  const __m256i bits = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_mask_storeu_epi16(p, first_lanes(n), bits);
}

FT_INLINE Vec select(Vec v, uint32_t bits) { return _mm512_maskz_mov_ps(__mmask16(bits), v); }

// Pairs of rows, then of pairs, then halves of registers: plain shuffles are faster than permutes.
FT_INLINE void transpose(Vec* rows) {
  Vec mixed[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    mixed[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    mixed[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_shuffle_ps(mixed[i], mixed[i + 2], 0x44);
    rows[i + 1] = _mm512_shuffle_ps(mixed[i], mixed[i + 2], 0xee);
    rows[i + 2] = _mm512_shuffle_ps(mixed[i + 1], mixed[i + 3], 0x44);
    rows[i + 3] = _mm512_shuffle_ps(mixed[i + 1], mixed[i + 3], 0xee);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const Vec a = rows[i & ~4 & 15], b = rows[i | 4];
    mixed[i] = i & 4 ? _mm512_shuffle_f32x4(a, b, 0xdd) : _mm512_shuffle_f32x4(a, b, 0x88);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_f32x4(mixed[i], mixed[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_f32x4(mixed[i], mixed[i + 8], 0xdd);
  }
}

#elif FT_LANES == 8

using Vec = __m256;

FT_INLINE Vec zero() { return _mm256_setzero_ps(); }
FT_INLINE Vec splat(float x) { return _mm256_set1_ps(x); }
FT_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
FT_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
FT_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
FT_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
FT_INLINE Vec fma(const float* a, Vec b, Vec c) { return fma(splat(*a), b, c); }
FT_INLINE Vec sub_product(Vec c, Vec a, Vec b) { return _mm256_fnmadd_ps(a, b, c); }

FT_INLINE __m256i lane_bits() { return _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128); }
FT_INLINE __m256i spread(uint32_t bits) {
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), lane_bits()),
                            lane_bits());
}
FT_INLINE __m256i first_lanes(int n) { return spread((1u << n) - 1); }

FT_INLINE __m128i load_halves(const void* p, int n) {
  if (n == kLanes) return _mm_loadu_si128(static_cast<const __m128i*>(p));
  uint16_t halves[kLanes] = {};
  memcpy(halves, p, size_t(n) * sizeof(uint16_t));
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(halves));
}
FT_INLINE void store_halves(void* p, __m128i v, int n) {
  if (n == kLanes) return _mm_storeu_si128(static_cast<__m128i*>(p), v);
  uint16_t halves[kLanes];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(halves), v);
  memcpy(p, halves, size_t(n) * sizeof(uint16_t));
}

FT_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
FT_INLINE Vec load(const float* p, int n) {
  show(p, n);
  return n == kLanes ? load(p) : _mm256_maskload_ps(p, first_lanes(n));
}
FT_INLINE Vec load(const bf16* p, int n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(p, n)), 16));
}
FT_INLINE Vec load(const fp16* p, int n) { return _mm256_cvtph_ps(load_halves(p, n)); }

FT_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
FT_INLINE void store(float* p, Vec v, int n) {
  show(p, n);
  n == kLanes ? store(p, v) : _mm256_maskstore_ps(p, first_lanes(n), v);
}
FT_INLINE void store(bf16* p, Vec v, int n) {
  const __m256i u = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i even = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256i bits = _mm256_srli_epi32(_mm256_blendv_epi8(even, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08);
  store_halves(p, _mm256_castsi256_si128(packed), n);
}
FT_INLINE void store(fp16* p, Vec v, int n) {
  store_halves(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), n);
}

FT_INLINE Vec select(Vec v, uint32_t bits) {
  return _mm256_and_ps(v, _mm256_castsi256_ps(spread(bits)));
}

FT_INLINE void transpose(Vec* rows) {
  Vec pairs[8], quads[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
}

#else

// The compilers' own vector type: SSE2 or NEON, or whatever the target has.
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));

FT_INLINE Vec zero() { return Vec{}; }
FT_INLINE Vec splat(float x) { return Vec{x, x, x, x}; }
FT_INLINE Vec add(Vec a, Vec b) { return a + b; }
FT_INLINE Vec mul(Vec a, Vec b) { return a * b; }
FT_INLINE Vec sub(Vec a, Vec b) { return a - b; }
FT_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
FT_INLINE Vec fma(const float* a, Vec b, Vec c) { return fma(splat(*a), b, c); }
FT_INLINE Vec sub_product(Vec c, Vec a, Vec b) { return c - a * b; }

FT_INLINE Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
FT_INLINE Vec load(const T* p, int n) {
  Vec v{};
  for (int lane = 0; lane < n; ++lane) v[lane] = to_float(p[lane]);
  return v;
}

FT_INLINE void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }
template <class T>
FT_INLINE void store(T* p, Vec v, int n) {
  for (int lane = 0; lane < n; ++lane) p[lane] = from_float<T>(v[lane]);
}

FT_INLINE Vec select(Vec v, uint32_t bits) {
  for (int lane = 0; lane < kLanes; ++lane) v[lane] = bits >> lane & 1 ? v[lane] : 0.0f;
  return v;
}

FT_INLINE void transpose(Vec* rows) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = i + 1; j < kLanes; ++j) {
      const float upper = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = upper;
    }
}

#endif

#if FT_BF16_DOT

// Two bf16 values per lane, the first in the low half: n <= 2 * kLanes values from p.
FT_INLINE Vec load_pairs(const bf16* p, int n) {
  const __mmask32 lanes = __mmask32((uint64_t(1) << n) - 1);
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(lanes, p));
}
FT_INLINE Vec select_pairs(Vec v, uint32_t bits) {
  return _mm512_castsi512_ps(_mm512_maskz_mov_epi16(bits, _mm512_castps_si512(v)));
}
// Lane i holds the top halves of lane i of `first` and `second`.
FT_INLINE Vec zip_pairs(Vec first, Vec second) {
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(first), 16);
  return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_castps_si512(second)));
}
FT_INLINE Vec dot_pairs(Vec a, Vec b, Vec c) {
  return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
// The same with one pair for all lanes; see fma.
FT_INLINE Vec dot_pairs(const float* a, Vec b, Vec c) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(b), "m"(*a));
  return c;
}

#endif

// Unsigned 64-bit lanes, as many as fill a vector.
constexpr int kWideLanes = kLanes / 2;
typedef uint64_t Wide __attribute__((vector_size(kWideLanes * sizeof(uint64_t))));

// The products of the low 32 bits.
FT_INLINE Wide mul_low(Wide a, Wide b) {
#if FT_LANES == 16
  return reinterpret_cast<Wide>(
      _mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif FT_LANES == 8
  return reinterpret_cast<Wide>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

}  // namespace
