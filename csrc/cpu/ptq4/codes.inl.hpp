// 4-bit codes in vectors, and the weights that they stand for. A vector of Codes has a 32-bit lane
// for eight codes that are neighbours in a row, the first in the lowest bits.
namespace {

constexpr int kLaneCodes = 8;
constexpr int kBlockCodes = kLaneCodes * kLanes;  // of one vector

// What the codes stand for, looked up by the lowest four bits of a lane.
#if FT_LANES == 16

using Codes = __m512i;
struct Table {
  Vec values;
};

FT_INLINE Codes load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
FT_INLINE Codes load_codes(const uint8_t* p, int64_t bytes) {
  return _mm512_maskz_loadu_epi8(~uint64_t(0) >> (64 - bytes), p);
}
template <int kCode>
FT_INLINE Codes from_code(Codes v) {
  return _mm512_srli_epi32(v, 4 * kCode);
}
FT_INLINE Vec as_floats(Codes v) { return _mm512_castsi512_ps(v); }
FT_INLINE Codes as_codes(Vec v) { return _mm512_castps_si512(v); }
FT_INLINE Table load_table(const float* values) { return {_mm512_loadu_ps(values)}; }
FT_INLINE Vec look_up(const Table& table, Codes v) {
  return _mm512_permutexvar_ps(v, table.values);
}
// Lane i has the i-th of 16 codes in its lowest bits.
FT_INLINE Codes spread_codes(uint64_t codes) {
  const __m512i halves =
      _mm512_mask_set1_epi32(_mm512_set1_epi32(int(codes)), 0xff00, int(codes >> 32));
  const __m512i by = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
  return _mm512_srlv_epi32(halves, by);
}

#elif FT_LANES == 8

using Codes = __m256i;
struct Table {
  Vec low, high;
};

FT_INLINE Codes load_codes(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
FT_INLINE Codes load_codes(const uint8_t* p, int64_t bytes) {
  uint8_t some[4 * kLanes] = {};
  memcpy(some, p, size_t(bytes));
  return load_codes(some);
}
template <int kCode>
FT_INLINE Codes from_code(Codes v) {
  return _mm256_srli_epi32(v, 4 * kCode);
}
FT_INLINE Vec as_floats(Codes v) { return _mm256_castsi256_ps(v); }
FT_INLINE Codes as_codes(Vec v) { return _mm256_castps_si256(v); }
FT_INLINE Table load_table(const float* values) {
  return {_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8)};
}
FT_INLINE Vec look_up(const Table& table, Codes v) {
  const Vec low = _mm256_permutevar8x32_ps(table.low, v);
  const Vec high = _mm256_permutevar8x32_ps(table.high, v);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(v, 28)));
}
FT_INLINE Codes spread_codes(uint64_t codes) {
  const __m256i by = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
  return _mm256_srlv_epi32(_mm256_set1_epi32(int(codes)), by);
}

#else

typedef uint32_t Codes __attribute__((vector_size(kLanes * sizeof(uint32_t))));
struct Table {
  float values[kCodes];
};

FT_INLINE Codes load_codes(const uint8_t* p) {
  Codes v;
  memcpy(&v, p, sizeof v);
  return v;
}
FT_INLINE Codes load_codes(const uint8_t* p, int64_t bytes) {
  Codes v{};
  memcpy(&v, p, size_t(bytes));
  return v;
}
template <int kCode>
FT_INLINE Codes from_code(Codes v) {
  return v >> 4 * kCode;
}
FT_INLINE Vec as_floats(Codes v) { return reinterpret_cast<Vec>(v); }
FT_INLINE Codes as_codes(Vec v) { return reinterpret_cast<Codes>(v); }
FT_INLINE Table load_table(const float* values) {
  Table table;
  memcpy(table.values, values, sizeof table.values);
  return table;
}
FT_INLINE Vec look_up(const Table& table, Codes v) {
  Vec found{};
  for (int lane = 0; lane < kLanes; ++lane) found[lane] = table.values[v[lane] & 15];
  return found;
}
FT_INLINE Codes spread_codes(uint64_t codes) {
  return Codes{uint32_t(codes), uint32_t(codes >> 4), uint32_t(codes >> 8), uint32_t(codes >> 12)};
}

#endif

template <int kValue>
struct Number {
  static constexpr int value = kValue;
};

// body(Number) for the codes 0 .. kCount - 1 of a lane: what they are shifted by is a constant.
template <int kCount, class Body>
FT_INLINE void for_each_code(const Body& body) {
  static_assert(kCount == 4 || kCount == 8, "of a lane, or of the first half");
  body(Number<0>{}), body(Number<1>{}), body(Number<2>{}), body(Number<3>{});
  if constexpr (kCount == 8)
    body(Number<4>{}), body(Number<5>{}), body(Number<6>{}), body(Number<7>{});
}

// ---- scales and zeros ----------------------------------------------------------------------

FT_INLINE float read_scale(const Int4Weight& w, const void* values, int64_t at) {
  return w.scale_dtype == FT_FLOAT32 ? static_cast<const float*>(values)[at]
                                     : to_float(static_cast<const bf16*>(values)[at]);
}
FT_INLINE float scale_of(const Int4Weight& w, int64_t n, int64_t group) {
  return read_scale(w, w.scale, n * w.groups + group);
}
// What is subtracted from table[c].
FT_INLINE float zero_of(const Int4Weight& w, int64_t n, int64_t group) {
  const int64_t at = n * w.groups + group;
  if (w.zero_kind == FT_ZERO_UINT8) return float(static_cast<const uint8_t*>(w.zero)[at]);
  if (w.zero_kind == FT_ZERO_FLOAT) return read_scale(w, w.zero, at);
  return w.codebook == FT_INT4 ? kImpliedZero : 0.0f;
}

FT_INLINE Table table_of(const Int4Weight& w) { return load_table(kCodebooks[w.codebook]); }

// ---- a row's weights -----------------------------------------------------------------------

// The weights of up to kLanes neighbouring features [feature, feature + count), of any row n.
struct RowReader {
  const Int4Weight& w;
  Table table;
  int64_t byte;    // of the first code; not of a permuted weight
  int count;       // of features
  bool one_group;  // all of them are in `group[0]`, and the codes are neighbours
  int64_t group[kLanes], position[kLanes];

  RowReader(const Int4Weight& weight, int64_t feature, int features)
      : w(weight), table(table_of(weight)), byte(feature / 2), count(features) {
    group[0] = feature / w.group;
    one_group =
        !w.position && feature % 2 == 0 && count && feature + count <= (group[0] + 1) * w.group;
    if (one_group) return;
    for (int i = 0; i < count; ++i) {
      position[i] = w.position ? w.position[feature + i] : feature + i;
      group[i] = position[i] / w.group;
    }
  }

  // The codes of kLanes features; those behind the last are 0.
  FT_INLINE Codes codes(int64_t n) const {
    const uint8_t* row = w.codes + n * w.row_bytes;
    uint64_t bits = 0;
    if (one_group && count == kLanes) {
      memcpy(&bits, row + byte, kLanes / 2);
    } else if (one_group) {
      memcpy(&bits, row + byte, size_t(count + 1) / 2);
      bits &= ~uint64_t(0) >> (64 - 4 * count);
    } else {
      for (int i = 0; i < count; ++i)
        bits |= uint64_t(row[position[i] / 2] >> position[i] % 2 * 4 & 15) << 4 * i;
    }
    return spread_codes(bits);
  }

  // table[c] - zero of kLanes features of row n; behind the last they are anything.
  FT_INLINE Vec steps(int64_t n) const {
    const Vec values = look_up(table, codes(n));
    if (one_group) return sub(values, splat(zero_of(w, n, group[0])));
    float zeros[kLanes] = {};
    for (int i = 0; i < count; ++i) zeros[i] = zero_of(w, n, group[i]);
    return sub(values, load(zeros));
  }

  FT_INLINE Vec weights(int64_t n) const {
    if (one_group) return mul(steps(n), splat(scale_of(w, n, group[0])));
    float scales[kLanes] = {};
    for (int i = 0; i < count; ++i) scales[i] = scale_of(w, n, group[i]);
    return mul(steps(n), load(scales));
  }
};

}  // namespace
