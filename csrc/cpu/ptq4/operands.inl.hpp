// A 4-bit weight as an operand of the GEMM core.
//
// Columns of y = x W^T, contracted over K, with bfloat16 x where vdpbf16ps exists: panels of small
// exact numbers, and the core scales a group's sum. kLanes rows of codes are transposed as 32-bit
// lanes, eight codes each, so a lane's item i is its codes i and i + 4: x comes in that order.
// Everywhere else panels of float32 weights, in the order of the codes.
//
// Columns of dX = dY W, contracted over N: panels of weights, rounded to bfloat16 where the product
// is one of pairs, as they would be in a dense product.
#include "cpu/ptq4/codes.inl.hpp"

namespace {

#if FT_BF16_DOT

// What a pair's table is multiplied by and its scales divided by, so that bfloat16 holds it best:
// int4's numbers and three times those of fp4 exactly; those of nf4 with a root mean square error
// of 3.2e-4 of the largest, where rounding random multiples of them gives 8.6e-4.
constexpr float kPairFactors[3] = {1.0f, 1.437006f, 3.0f};

// Of 32 entries, so that the code next to the one looked up need not be masked.
struct PairTable {
  __m512i values;
};

inline PairTable pair_table(const Int4Weight& w) {
  const float zero = w.zero_kind == FT_ZERO_NONE && w.codebook == FT_INT4 ? kImpliedZero : 0.0f;
  uint16_t values[2 * kCodes];
  for (int c = 0; c < 2 * kCodes; ++c)
    values[c] = to_bf16(kCodebooks[w.codebook][c % kCodes] * kPairFactors[w.codebook] - zero).bits;
  return {_mm512_loadu_si512(values)};
}

#endif

// What Operand::data points to.
struct Int4Columns {
  Int4Weight w;
  // Of few rows, and only with zeros: the sums of the eight values of x in each lane, [row][lane].
  const float* lane_sums;
  int64_t lane_sums_stride;
  // What a group is cut into, with one scale and zero, so that no sum goes on from one vector of
  // codes to the next: 1 where groups are shorter.
  int64_t parts;
#if FT_BF16_DOT
  PairTable pairs{};
#endif
};

inline const Int4Columns& int4_columns(const Operand& a) {
  return *static_cast<const Int4Columns*>(a.data);
}

// The kLanes rows of codes from `line` on, those at `position` first, as kLanes vectors: lane i of
// vector j has the eight codes of row i from position + 8 j on.
FT_INLINE void load_lanes(const Int4Weight& w, int64_t line, int lines, int64_t position,
                          Vec* lanes) {
  const uint8_t* row = w.codes + line * w.row_bytes + position / 2;
  const int64_t bytes = w.row_bytes - position / 2, ahead = 2 * kLanes * w.row_bytes;
  if (lines >= kLanes && bytes >= 4 * kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i, row += w.row_bytes) {
      __builtin_prefetch(row + ahead, 0, 2);
      lanes[i] = as_floats(load_codes(row));
    }
  } else {
    for (int i = 0; i < kLanes; ++i, row += w.row_bytes)
      lanes[i] = i >= lines            ? zero()
                 : bytes >= 4 * kLanes ? as_floats(load_codes(row))
                                       : as_floats(load_codes(row, bytes));
  }
  transpose(lanes);
}

// ---- y, in float32 -------------------------------------------------------------------------

inline void pack_weights(const Operand& a, int64_t line, int lines, int64_t begin, int64_t end,
                         float* strip) {
  const Int4Weight& w = int4_columns(a).w;
  const Table table = table_of(w);
  int64_t group = begin / w.group - 1, left = 0;
  Vec scales = zero(), zeros = zero();
  const auto read_group = [&] {
    float values[2][kLanes] = {};
    for (int i = 0; i < lines; ++i) {
      values[0][i] = scale_of(w, line + i, group);
      values[1][i] = zero_of(w, line + i, group);
    }
    scales = load(values[0]);
    zeros = load(values[1]);
  };
  for (int64_t p = begin; p < end; p += kBlockCodes) {
    Vec lanes[kLanes];
    load_lanes(w, line, lines, p, lanes);
    const int64_t used = lesser(kBlockCodes, end - p);
    for (int j = 0; j < ceil_div(used, kLaneCodes); ++j)
      for_each_code<kLaneCodes>([&](auto code) __attribute__((always_inline)) {
        const int64_t item = j * kLaneCodes + code.value;
        if (item >= used) return;
        if (!left) {
          ++group;
          left = (group + 1) * w.group - (p + item);
          read_group();
        }
        --left;
        const Codes codes = from_code<code.value>(as_codes(lanes[j]));
        store(strip + item * kLanes, mul(sub(look_up(table, codes), zeros), scales));
      });
    strip += kBlockCodes * kLanes;
  }
}

// ---- y, in pairs ---------------------------------------------------------------------------

#if FT_BF16_DOT

// Items 0..3 of a lane: those of the lowest code of each of its halves.
FT_INLINE Vec look_up(const PairTable& table, Codes v) {
  return as_floats(_mm512_permutexvar_epi16(v, table.values));
}

inline void pack_pairs(const Operand& a, int64_t line, int lines, int64_t begin, int64_t end,
                       float* strip) {
  const Int4Weight& w = int4_columns(a).w;
  const PairTable table = int4_columns(a).pairs;
  for (int64_t p = begin; p < end; p += kBlockCodes) {
    Vec lanes[kLanes];
    load_lanes(w, line, lines, p, lanes);
    const int used = int(lesser(kLanes, ceil_div(end - p, kLaneCodes)));
    for (int j = 0; j < used; ++j)
      for_each_code<4>([&](auto code) __attribute__((always_inline)) {
        store(strip, look_up(table, from_code<code.value>(as_codes(lanes[j]))));
        strip += kLanes;
      });
  }
}

template <class T>
void read_lines(const T* values, int64_t stride, int lines, int64_t first, int64_t last,
                int64_t parts, float* to) {
  const int64_t group = first / parts;
  for (int i = 0; i < lines; ++i, values += stride) {
    const T* from = values + group;
    int64_t left = (group + 1) * parts - first;
    for (int64_t part = 0; part < last - first; ++part) {
      to[part * 2 * kLanes + i] = to_float(*from);
      if (--left) continue;
      ++from;
      left = parts;
    }
  }
}

// Groups::read.
inline void read_groups_of(const void* source, int64_t line, int lines, int64_t first, int64_t last,
                           float* scales, float* zeros) {
  const Int4Columns& columns = *static_cast<const Int4Columns*>(source);
  const Int4Weight& w = columns.w;
  const int64_t at = line * w.groups;
  const auto read = [&](const auto* values, float* to) {
    read_lines(values + at, w.groups, lines, first, last, columns.parts, to);
  };
  const auto read_floats = [&](const void* values, float* to) {
    w.scale_dtype == FT_FLOAT32 ? read(static_cast<const float*>(values), to)
                                : read(static_cast<const bf16*>(values), to);
  };
  read_floats(w.scale, scales);
  if (w.codebook != FT_INT4)
    for (int64_t i = 0; i < 2 * kLanes * (last - first); ++i)
      scales[i] *= 1.0f / kPairFactors[w.codebook];
  if (w.zero_kind == FT_ZERO_FLOAT) read_floats(w.zero, zeros);
  if (w.zero_kind == FT_ZERO_UINT8) read(static_cast<const uint8_t*>(w.zero), zeros);
}

// Lane i holds the bfloat16s of lane i of `first` and `second`.
FT_INLINE Vec round_pairs(Vec first, Vec second) {
  const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return as_floats(_mm512_permutexvar_epi16(order, halves));
}

#endif

// ---- dX ------------------------------------------------------------------------------------

#if FT_BF16_DOT

// kLanes features of one group: two rows have 2 * kCodes weights there, which make one table.
inline void pack_pairs_across(const Int4Weight& w, int64_t feature, int64_t begin, int64_t end,
                              float* strip) {
  const int64_t group = feature / w.group;
  const Table table = table_of(w);
  const auto weights = [&](int64_t n) __attribute__((always_inline)) {
    return mul(sub(table.values, splat(zero_of(w, n, group))), splat(scale_of(w, n, group)));
  };
  // Of lane i: the words of both rows that have their codes i, and where in them.
  const __m512i words = _mm512_add_epi32(
      _mm512_set1_epi32(4 << 16),
      _mm512_mullo_epi32(_mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
                         _mm512_set1_epi32(0x10001)));
  const __m512i shifts =
      _mm512_mullo_epi32(_mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12),
                         _mm512_set1_epi32(0x10001));
  const __m512i code = _mm512_set1_epi32(0xf000f), of_second = _mm512_set1_epi32(kCodes << 16);
  const uint8_t* row = w.codes + begin * w.row_bytes + feature / 2;
  for (int64_t n = begin; n < end; n += 2, row += 2 * w.row_bytes, strip += kLanes) {
    const bool both = n + 1 < end;
    const uint8_t* const next = both ? row + w.row_bytes : row;
    __builtin_prefetch(row + 2 * kShortRun * w.row_bytes, 0, 2);
    __builtin_prefetch(next + 2 * kShortRun * w.row_bytes, 0, 2);
    const __m512i codes = _mm512_castsi128_si512(
        _mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(row)),
                           _mm_loadl_epi64(reinterpret_cast<const __m128i*>(next))));
    const __m512i at = _mm512_srlv_epi16(_mm512_permutexvar_epi16(words, codes), shifts);
    const __m512i pairs =
        reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(both ? weights(n + 1) : zero(), weights(n)));
    // (at & code) | of_second
    const __m512i places = _mm512_ternarylogic_epi32(at, code, of_second, 0xea);
    store(strip, as_floats(_mm512_permutexvar_epi16(places, pairs)));
  }
}

#endif

template <bool kPairs>
void pack_weights_across(const Operand& a, int64_t line, int lines, int64_t begin, int64_t end,
                         float* strip) {
  const RowReader row(int4_columns(a).w, line, lines);
#if FT_BF16_DOT
  if (kPairs && row.one_group && lines == kLanes)
    return pack_pairs_across(row.w, line, begin, end, strip);
#endif
  for (int64_t n = begin; n < end; n += kPairs ? 2 : 1, strip += kLanes) {
#if FT_BF16_DOT
    if constexpr (kPairs) {
      store(strip, round_pairs(row.weights(n), n + 1 < end ? row.weights(n + 1) : zero()));
      continue;
    }
#endif
    store(strip, row.weights(n));
  }
}

}  // namespace
