// Products of bytes: C[i, j] = sum over groups g of
//   row_scale[i, g] * column_scale[j, g] * (sum over depth p of g of rows[i, p] * columns[j, p]).
//
// Rows are unsigned bytes a, columns signed bytes b of at most 15 in magnitude, which is what
// vpdpbusd multiplies, and what the pairs of vpmaddubsw hold without saturation. What a stands for
// is a - offset: the sum starts from -offset times the sum of b, exact in 32 bits.
//
// Four bytes next to each other in depth are a quad, one 32-bit word. Rows are packed as
// [quad][row], columns as [quad][lane]. Within eight bytes of depth both have the order 0 2 4 6
// 1 3 5 7: a word of packed nibbles is then two quads, its low nibbles and its high ones.
//
// Sums of bytes are exact, so every level of the instruction set has the same. What is float32,
// scaling and adding up groups in sequence, is IEEE operations one by one: the files that include
// this are compiled without contraction to multiply-adds.
#include "cpu/ptq4/quantize.inl.hpp"

namespace {

typedef int8_t Bytes __attribute__((vector_size(kLanes * sizeof(int32_t))));

// Rows of a register tile of two strips of columns, as the registers allow.
constexpr int kByteRows = kLanes == 16 ? (FT_VNNI ? 14 : 12) : kLanes == 8 ? 4 : 2;
constexpr int kByteStrips = 2;
constexpr int kByteColumns = kByteStrips * kLanes;
constexpr int64_t kCodesOfWord = 8;

// sum + the products of the four bytes of each lane, unsigned times signed.
FT_INLINE Words dot_quads(Words sum, Words a, Words b) {
#if FT_VNNI
  return reinterpret_cast<Words>(_mm512_dpbusd_epi32(
      reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif FT_LANES == 16
  const __m512i pairs =
      _mm512_maddubs_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b));
  return sum + reinterpret_cast<Words>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#elif FT_LANES == 8
  const __m256i pairs =
      _mm256_maddubs_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b));
  return sum + reinterpret_cast<Words>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
  // By 16-bit pairs, which the least of vector units multiplies: b's sign comes with the shifts.
  typedef int16_t Halves __attribute__((vector_size(kLanes * sizeof(int32_t))));
  const Halves a_even = reinterpret_cast<Halves>(a & 0x00ff00ff);
  const Halves a_odd = reinterpret_cast<Halves>((a >> 8) & 0x00ff00ff);
  const Halves b_even = (reinterpret_cast<Halves>(b) << 8) >> 8;
  const Halves b_odd = reinterpret_cast<Halves>(b) >> 8;
  const Words pairs = reinterpret_cast<Words>(a_even * b_even + a_odd * b_odd);
  return sum + ((pairs << 16) >> 16) + (pairs >> 16);
#endif
}

// How depth is cut into groups, each filled up to whole words of codes.
struct ByteDepth {
  int64_t k, group, groups;

  int64_t begin(int64_t g) const { return g * group; }
  int64_t length(int64_t g) const { return lesser(group, k - g * group); }
  int64_t words_of_group() const { return ceil_div(group, kCodesOfWord); }
  int64_t words_before(int64_t g) const { return g * words_of_group(); }
  int64_t words(int64_t g) const { return ceil_div(length(g), kCodesOfWord); }
  int64_t words() const { return groups ? words_before(groups - 1) + words(groups - 1) : 0; }
  int64_t quads() const { return 2 * words(); }
};

// ---- rows ----------------------------------------------------------------------------------

// Strips of so many rows, each: [quad][row] words, then [group][row] scales, then [group][row] sums
// of what the bytes stand for.
struct ByteRows {
  uint32_t* data;
  int height;
  ByteDepth depth;

  int64_t strip_words() const { return (depth.quads() + 2 * depth.groups) * height; }
  uint32_t* quads(int64_t strip) const { return data + strip * strip_words(); }
  float* scales(int64_t strip) const {
    return reinterpret_cast<float*>(quads(strip) + depth.quads() * height);
  }
  float* sums(int64_t strip) const { return scales(strip) + depth.groups * height; }
};

// One row of depth.words() words of bytes into its place.
inline void pack_byte_row(const ByteRows& rows, int64_t strip, int row, const uint8_t* bytes) {
  uint32_t* to = rows.quads(strip) + row;
  for (int64_t word = 0; word < rows.depth.words(); ++word, to += 2 * rows.height) {
    uint64_t eight;
    memcpy(&eight, bytes + word * kCodesOfWord, sizeof eight);
    const auto every_second = [](uint64_t v) {
      v &= 0x00ff00ff00ff00ff;
      v = (v | v >> 8) & 0x0000ffff0000ffff;
      return uint32_t(v | v >> 16);
    };
    to[0] = every_second(eight);
    to[rows.height] = every_second(eight >> 8);
  }
}

// The height of all strips of so many rows, of those that there is a tile for.
inline int byte_row_height(int64_t rows) {
  const int height = int(ceil_div(rows, greater(1, ceil_div(rows, kByteRows))));
  return height <= 1 ? 1 : height + height % 2;
}

// ---- columns -------------------------------------------------------------------------------

// Two strips of columns: each [quad][lane] words, and [group][lane] of the rest.
struct ByteColumns {
  uint32_t* data;
  ByteDepth depth;

  static int64_t words(const ByteDepth& depth) {
    return kByteStrips * kLanes * (depth.quads() + 3 * depth.groups);
  }
  uint32_t* quads(int strip) const { return data + strip * depth.quads() * kLanes; }
  uint32_t* rest(int which, int strip) const {
    return data + kByteStrips * depth.quads() * kLanes +
           (which * kByteStrips + strip) * depth.groups * kLanes;
  }
  int32_t* first_sums(int strip) const { return reinterpret_cast<int32_t*>(rest(0, strip)); }
  float* scales(int strip) const { return reinterpret_cast<float*>(rest(1, strip)); }
  float* zeros(int strip) const { return reinterpret_cast<float*>(rest(2, strip)); }
};

// The codes of a row with every group filled up to whole words.
inline void fill_up_groups(const uint8_t* codes, const ByteDepth& depth, uint8_t* to) {
  memset(to, 0, size_t(depth.words() * 4));
  for (int64_t g = 0; g < depth.groups; ++g)
    for (int64_t at = 0; at < depth.length(g); ++at) {
      const int64_t k = depth.begin(g) + at, filled = depth.words_before(g) * kCodesOfWord + at;
      to[filled / 2] |= uint8_t((codes[k / 2] >> k % 2 * 4 & 0xf) << filled % 2 * 4);
    }
}

// Strip `strip` of columns from `lines` rows of code words, `stride` bytes apart: codes minus zeros
// (one word of four equal bytes per group and lane), and the first sums -offset * their sums.
inline void pack_byte_columns(const ByteColumns& columns, int strip, const uint8_t* codes,
                              int64_t stride, int lines, const Words* zeros,
                              const int32_t* offsets) {
  const ByteDepth& depth = columns.depth;
  const int64_t words = depth.words(), per_group = depth.words_of_group();
  uint32_t* to = columns.quads(strip);
  int32_t* const first_sums = columns.first_sums(strip);
  const Words ones = splat_word(0x01010101);
  Words sum{};
  int64_t g = 0, left = per_group;
  for (int64_t word = 0; word < words; word += kLanes) {
    const int n = int(lesser(kLanes, words - word));
    const int64_t bytes = lesser(n * 4, stride - word * 4);
    Vec rows[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      rows[i] = zero();
      if (i >= lines) continue;
      const uint8_t* from = codes + i * stride + word * 4;
      if (bytes == kLanes * 4)
        memcpy(&rows[i], from, kLanes * 4);
      else
        memcpy(&rows[i], from, size_t(bytes));
    }
    transpose(rows);
    for (int i = 0; i < n; ++i, to += 2 * kLanes) {
      const Words eight = reinterpret_cast<Words>(rows[i]), z = zeros[g];
      const auto minus_zero = [&](Words nibbles) {
        return reinterpret_cast<Words>(reinterpret_cast<Bytes>(nibbles & 0x0f0f0f0f) -
                                       reinterpret_cast<Bytes>(z));
      };
      const Words low = minus_zero(eight), high = minus_zero(eight >> 4);
      store_words(to, low);
      store_words(to + kLanes, high);
      sum = dot_quads(dot_quads(sum, ones, low), ones, high);
      if (--left) continue;
      store_words(first_sums + g * kLanes, sum * -offsets[g]);
      sum = Words{};
      left = per_group;
      ++g;
    }
  }
  if (left < per_group) store_words(first_sums + g * kLanes, sum * -offsets[g]);
}

// ---- register tiles ------------------------------------------------------------------------

// tile (kRows, kByteColumns) = rows times columns.
template <int kRows, bool kZeros>
void byte_tile(const ByteRows& rows, int64_t row_strip, const ByteColumns& columns, float* tile) {
  const ByteDepth& depth = rows.depth;
  const uint32_t* a = rows.quads(row_strip);
  const uint32_t* b = columns.quads(0);
  const int64_t next_strip = depth.quads() * kLanes, rest_strip = depth.groups * kLanes;
  const int32_t* first_sums = columns.first_sums(0);
  const float *scales = columns.scales(0), *zeros = columns.zeros(0);
  const float *row_scales = rows.scales(row_strip), *row_sums = rows.sums(row_strip);
  for (int at = 0; at < kRows * kByteColumns; at += kLanes) store(tile + at, zero());
  for (int64_t g = 0; g < depth.groups; ++g) {
    Words sum[kRows][kByteStrips];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kByteStrips; ++j) sum[i][j] = load_words(first_sums + j * rest_strip);
    for (int64_t quad = 0; quad < 2 * depth.words(g); ++quad) {
      const Words left = load_words(b), right = load_words(b + next_strip);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const Words row = splat_word(int32_t(a[i]));
        sum[i][0] = dot_quads(sum[i][0], row, left);
        sum[i][1] = dot_quads(sum[i][1], row, right);
      }
      a += kRows;
      b += kLanes;
    }
#pragma GCC unroll 2
    for (int j = 0; j < kByteStrips; ++j) {
      const Vec scale = load(scales + j * rest_strip);
      const Vec z = kZeros ? load(zeros + j * rest_strip) : zero();
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        Vec total = as_floats(sum[i][j]);
        if (kZeros) total = total - mul(z, splat(row_sums[i]));
        float* const at = tile + i * kByteColumns + j * kLanes;
        store(at, add(load(at), mul(mul(scale, splat(row_scales[i])), total)));
      }
    }
    first_sums += kLanes;
    scales += kLanes;
    zeros += kLanes;
    row_scales += kRows;
    row_sums += kRows;
  }
}

using ByteTile = void (*)(const ByteRows&, int64_t, const ByteColumns&, float*);

template <bool kZeros>
ByteTile byte_tile_of_height(int rows) {
  switch (rows) {
    case 1:
      return byte_tile<1, kZeros>;
    case 2:
      return byte_tile<2, kZeros>;
#if FT_LANES >= 8
    case 4:
      return byte_tile<4, kZeros>;
#endif
#if FT_LANES >= 16
    case 6:
      return byte_tile<6, kZeros>;
    case 8:
      return byte_tile<8, kZeros>;
    case 10:
      return byte_tile<10, kZeros>;
    case 12:
      return byte_tile<12, kZeros>;
#endif
    default:
      return byte_tile<kByteRows, kZeros>;
  }
}

}  // namespace
