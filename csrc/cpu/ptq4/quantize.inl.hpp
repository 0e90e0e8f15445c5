// Rounding activations to codes. IEEE operations one by one, so that every level and every backend
// has the same codes: files that include this are compiled without contraction to multiply-adds.
namespace {

typedef int32_t Words __attribute__((vector_size(kLanes * sizeof(int32_t))));

FT_INLINE Words splat_word(int32_t word) { return Words{} + word; }
FT_INLINE Words load_words(const void* p) {
  Words w;
  memcpy(&w, p, sizeof w);
  return w;
}
FT_INLINE void store_words(void* p, Words w) { memcpy(p, &w, sizeof w); }
FT_INLINE Vec as_floats(Words w) {
#if FT_LANES == 16
  return _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(w));
#else
  return __builtin_convertvector(w, Vec);
#endif
}

// Adding it rounds a float of less than 2^22 to an integer, ties to even, in the low bits.
constexpr float kRounder = 12582912.0f;
constexpr int32_t kRounderBits = 0x4b400000;
constexpr int32_t kMagnitude = 0x7fffffff, kInfinity = 0x7f800000, kNan = 0x7fc00000;

FT_INLINE Vec clamp(Vec v, Vec low, Vec high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}
FT_INLINE Words rounded(Vec v) {
  return reinterpret_cast<Words>(add(v, splat(kRounder))) - kRounderBits;
}
inline int32_t rounded(float v) { return int32_t(float_bits(v + kRounder)) - kRounderBits; }

// How a group is quantized: code = round(clamp(x / scale, low, high)) + zero.
struct Range {
  float scale;  // NaN where there is no such range
  int32_t zero;
  float low, high;
};

inline Range range_of(const LearnedRange& r, int64_t g) {
  const int64_t at = r.groups == 1 ? 0 : g;
  const float scale = r.scale[at], z = r.zero[at];
  const bool fine = scale > 0 && z - z == 0;
  const int32_t zero = rounded(!fine || z < 0 ? 0.0f : z > 15 ? 15.0f : z);
  return {fine ? scale : bits_float(kNan), zero, float(-zero), float(15 - zero)};
}

// Row m of x as floats, in the order of places.
template <class T>
void load_row_of(const Activations& x, int64_t m, float* to) {
  const T* from = static_cast<const T*>(x.data) + m * x.stride_m;
  if (x.perm) {
    for (int64_t j = 0; j < x.k; ++j) to[j] = to_float(from[x.perm[j] * x.stride_k]);
  } else if (x.stride_k == 1) {
    for (int64_t j = 0; j < x.k; j += kLanes) {
      const int n = int(lesser(kLanes, x.k - j));
      store(to + j, load(from + j, n), n);
    }
  } else {
    for (int64_t j = 0; j < x.k; ++j) to[j] = to_float(from[j * x.stride_k]);
  }
}

inline void load_row(const Activations& x, int64_t m, float* to) {
  x.dtype == FT_FLOAT32    ? load_row_of<float>(x, m, to)
  : x.dtype == FT_BFLOAT16 ? load_row_of<bf16>(x, m, to)
                           : load_row_of<fp16>(x, m, to);
}

}  // namespace
