// Few rows of x times a 4-bit weight, straight from its codes: bound by how fast they come from
// memory. Lanes are parts of a row's sum, eight codes of every block of kLanes * 8, so codes need
// no transposing; a block's sums are scaled by lane, added up, and the lanes summed once at the
// end.
#include "cpu/ptq4/operands.inl.hpp"

namespace {

// Blocks of codes whose scales are spread over the lanes at once.
constexpr int kSpreadBlocks = 32;
constexpr int64_t kSpread = kSpreadBlocks * kLanes;
// How far ahead of use codes are asked for.
constexpr int64_t kCodesAhead = 1024;

// The group's value for every lane of [first, end): lanes never lie in two groups.
template <class Read>
FT_INLINE void spread_groups(const Int4Weight& w, int64_t first, int64_t end, float* to,
                             const Read& read) {
  const int64_t lanes = w.group / kLaneCodes;
  for (int64_t g = first / lanes; g * lanes < end; ++g) {
    const Vec value = splat(read(g));
    const int64_t last = lesser((g + 1) * lanes, end);
    for (int64_t lane = greater(g * lanes, first); lane < last; lane += kLanes)
      store(to + lane - first, value);
  }
}

// The numbers that codes stand for, less the implied zero-point.
inline Table centred_table(const Int4Weight& w) {
  const float zero = w.zero_kind == FT_ZERO_NONE && w.codebook == FT_INT4 ? kImpliedZero : 0.0f;
  float values[kCodes];
  for (int c = 0; c < kCodes; ++c) values[c] = kCodebooks[w.codebook][c] - zero;
  return load_table(values);
}

template <bool kPairs>
FT_INLINE auto few_rows_table(const Int4Weight& w) {
#if FT_BF16_DOT
  if constexpr (kPairs) return pair_table(w);
#endif
  if constexpr (!kPairs) return centred_table(w);
}

// totals[i] = row i times kLanes lines of which there are `lines`, over positions [begin, end).
template <bool kPairs, int kRows, bool kZeros>
void rows_times_codes(const Int4Columns& columns, const float* rows, int64_t row_stride,
                      int64_t line, int lines, int64_t begin, int64_t end, Vec* totals) {
  constexpr int kItems = kPairs ? 4 : 8;  // of a lane
  constexpr int kTogether = kLanes == 16 ? (kRows < 4 ? 4 : 2) : kRows < 4 ? 2 : 1;
  const Int4Weight& w = columns.w;
  const auto table = few_rows_table<kPairs>(w);
  const int64_t bytes = w.row_bytes - begin / 2;
  const int64_t blocks = ceil_div(lesser(end, w.k) - begin, kBlockCodes);
  // Where the lines that come after these are.
  const int64_t next = (kTogether - 1) * w.row_bytes;
  Vec sums[kRows][kLanes];
  for (int first = 0; first < kLanes; first += kTogether) {
    const uint8_t* from[kTogether];
    for (int j = 0; j < kTogether; ++j)
      from[j] = w.codes + (line + lesser(first + j, lines - 1)) * w.row_bytes + begin / 2;
    Vec master[kRows][kTogether];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kTogether; ++j) master[i][j] = zero();
    for (int64_t b = 0; b < blocks; b += kSpreadBlocks) {
      float scales[kTogether][kSpread + kLanes], zeros[kTogether][kZeros ? kSpread + kLanes : 1];
      const int64_t last = lesser(b + kSpreadBlocks, blocks);
      for (int j = 0; j < kTogether; ++j) {
        const int64_t n = line + lesser(first + j, lines - 1);
        const int64_t lane = begin / kLaneCodes + b * kLanes;
        const int64_t lane_end = lesser(lane + (last - b) * kLanes, ceil_div(w.k, kLaneCodes));
        spread_groups(w, lane, lane_end, scales[j], [&](int64_t g) { return scale_of(w, n, g); });
        if (kZeros)
          spread_groups(w, lane, lane_end, zeros[j], [&](int64_t g) { return zero_of(w, n, g); });
      }
      const auto block = [&](int64_t at, const auto& read) __attribute__((always_inline)) {
        Codes codes[kTogether];
        Vec sum[kRows][kTogether];
#pragma GCC unroll 4
        for (int j = 0; j < kTogether; ++j) codes[j] = read(from[j] + at * 4 * kLanes);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
          for (int j = 0; j < kTogether; ++j) sum[i][j] = zero();
        for_each_code<kItems>([&](auto code) __attribute__((always_inline)) {
          Vec row[kRows];
#pragma GCC unroll 4
          for (int i = 0; i < kRows; ++i)
            row[i] = load(rows + i * row_stride + (at * kItems + code.value) * kLanes);
#pragma GCC unroll 4
          for (int j = 0; j < kTogether; ++j) {
            const Vec column = look_up(table, from_code<code.value>(codes[j]));
#pragma GCC unroll 4
            for (int i = 0; i < kRows; ++i)
              sum[i][j] = multiply_add<kPairs>(row[i], column, sum[i][j]);
          }
        });
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
          for (int j = 0; j < kTogether; ++j) {
            const int64_t lane = (at - b) * kLanes;
            if (kZeros) {
              const float* x = columns.lane_sums + i * columns.lane_sums_stride;
              sum[i][j] = sub_product(sum[i][j], load(zeros[j] + lane),
                                      load(x + begin / kLaneCodes + at * kLanes));
            }
            master[i][j] = fma(sum[i][j], load(scales[j] + lane), master[i][j]);
          }
      };
      int64_t at = b;
      for (; at < last && (at + 1) * 4 * kLanes <= bytes; ++at) {
#pragma GCC unroll 4
        for (int j = 0; j < kTogether; ++j) {
          const int64_t ahead = at * 4 * kLanes + kCodesAhead;
          __builtin_prefetch(from[j] + ahead + (ahead < bytes ? 0 : next), 0, 2);
        }
        block(at, [](const uint8_t* p) __attribute__((always_inline)) { return load_codes(p); });
      }
      if (at < last) {
        const int64_t rest = bytes - at * 4 * kLanes;
        for (int j = 0; j < kTogether; ++j)
          for (int lane = 0; lane < kLanes; ++lane) {
            // Lanes behind the last code: nothing is read there, and nothing may be made of it.
            if (lane * 4 < rest) continue;
            scales[j][(at - b) * kLanes + lane] = 0.0f;
            if (kZeros) zeros[j][(at - b) * kLanes + lane] = 0.0f;
          }
        block(at, [rest](const uint8_t* p)
                      __attribute__((always_inline)) { return load_codes(p, rest); });
      }
    }
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kTogether; ++j) sums[i][first + j] = master[i][j];
  }
  for (int i = 0; i < kRows; ++i) {
    transpose(sums[i]);
    totals[i] = add_in_pairs(sums[i]);
  }
}

template <bool kPairs, bool kZeros>
void multiply_codes(const Operand& a, const float* rows, int64_t row_stride, int height,
                    int64_t line, int lines, int64_t begin, int64_t end, Vec* totals) {
  const Int4Columns& columns = int4_columns(a);
  const auto multiply = height == 1   ? rows_times_codes<kPairs, 1, kZeros>
                        : height == 2 ? rows_times_codes<kPairs, 2, kZeros>
                                      : rows_times_codes<kPairs, kFewRows, kZeros>;
  for (int first = 0; first < lines; first += kLanes, totals += height)
    multiply(columns, rows, row_stride, line + first, lines - first, begin, end, totals);
}

// Few rows times the codes where they lie: bfloat16 x in pairs, any other in float32.
inline auto choose_codes_in_place(const Int4Weight& w, bool pairs) -> decltype(Operand::multiply) {
  const bool zeros = w.zero_kind != FT_ZERO_NONE;
#if FT_BF16_DOT
  if (pairs) return zeros ? multiply_codes<true, true> : multiply_codes<true, false>;
#else
  (void)pairs;
#endif
  return zeros ? multiply_codes<false, true> : multiply_codes<false, false>;
}

}  // namespace
