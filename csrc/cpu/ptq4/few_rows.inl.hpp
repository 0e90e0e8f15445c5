// Few rows of x times a 4-bit weight, straight from its codes: bound by how fast they come from
// memory. Lanes are parts of a row's sum, eight codes of every block of kLanes * 8, so codes need
// no transposing; a block's sums are scaled by lane, added up, and the lanes summed once at the
// end.
namespace {

// Blocks of codes whose scales are made ready at once.
constexpr int kReadyBlocks = 32;
// How far ahead of use codes are asked for, where arithmetic holds the loads up. Without it the
// hardware foresees one stream of codes better than it is told of them.
constexpr int64_t kCodesAhead = 2048;

// The values of a row's groups for blocks [first, end) of its codes: one for each block where a
// group has whole blocks, else one for each lane, of which none lies in two groups. Groups of one
// block and of half a block, the usual ones, have loops of their own.
template <bool kWholeBlocks, class Read>
FT_INLINE void ready_groups(const Int4Weight& w, int64_t first, int64_t end, float* to,
                            const Read& read) {
  constexpr int kCodesOf = kWholeBlocks ? kBlockCodes : kLaneCodes;
  const int64_t per_group = w.group / kCodesOf;
  if (kWholeBlocks && per_group == 1) {
    for (int64_t group = first; group < end; ++group) *to++ = read(group);
    return;
  }
  if (!kWholeBlocks && per_group == kLanes / 2) {
    constexpr uint32_t kFirstHalf = kAllLanes >> kLanes / 2;
    for (int64_t group = 2 * first; group < 2 * end; group += 2, to += kLanes) {
      const Vec second = splat(group + 1 < w.groups ? read(group + 1) : 0.0f);
      store(to,
            add(select(splat(read(group)), kFirstHalf), select(second, kAllLanes - kFirstHalf)));
    }
    return;
  }
  int64_t at = first * (kBlockCodes / kCodesOf);
  const int64_t last = lesser(end * (kBlockCodes / kCodesOf), ceil_div(w.k, kCodesOf));
  int64_t group = at / per_group;
  for (int64_t left = (group + 1) * per_group - at; at < last; ++group, left = per_group) {
    const float value = read(group);
    left = lesser(left, last - at);
    at += left;
    if (kWholeBlocks) {
      for (; left > 0; --left) *to++ = value;
    } else {
      // What is written too much, the next group or nobody has.
      for (int64_t lane = 0; lane < left; lane += kLanes) store(to + lane, splat(value));
      to += left;
    }
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
template <bool kPairs, int kRows, bool kZeros, bool kWholeBlocks>
void rows_times_codes(const Int4Columns& columns, const float* rows, int64_t row_stride,
                      int64_t line, int lines, int64_t begin, int64_t end, Vec* totals) {
  constexpr int kItems = kPairs ? 4 : 8;  // of a lane
  // One line after the other is one stream of memory. Only where loads of x bound the product are
  // two lines taken in turns.
  constexpr int kTogether = kLanes == 16 && kRows == kFewRows ? 2 : 1;
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
    for (int64_t b = 0; b < blocks; b += kReadyBlocks) {
      constexpr int kValues = kWholeBlocks ? 1 : kLanes;  // of a block
      constexpr int64_t kReady = (kReadyBlocks + 1) * kValues;
      float scales[kTogether][kReady], zeros[kTogether][kZeros ? kReady : 1];
      const int64_t last = lesser(b + kReadyBlocks, blocks), block0 = begin / kBlockCodes;
      for (int j = 0; j < kTogether; ++j) {
        const int64_t n = line + lesser(first + j, lines - 1);
        ready_groups<kWholeBlocks>(w, block0 + b, block0 + last, scales[j],
                                   [&](int64_t g) { return scale_of(w, n, g); });
        if (kZeros)
          ready_groups<kWholeBlocks>(w, block0 + b, block0 + last, zeros[j],
                                     [&](int64_t g) { return zero_of(w, n, g); });
      }
      const auto value = [b](const float* values, int64_t at) __attribute__((always_inline)) {
        return kWholeBlocks ? splat(values[at - b]) : load(values + (at - b) * kLanes);
      };
      const auto block = [&](int64_t at, const auto& read) __attribute__((always_inline)) {
        Codes codes[kTogether];
        Vec sum[kRows][kTogether];
#pragma GCC unroll 4
        for (int j = 0; j < kTogether; ++j) {
          codes[j] = read(from[j] + at * 4 * kLanes);
        }
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
            if (kZeros) {
              const float* x = columns.lane_sums + i * columns.lane_sums_stride;
              sum[i][j] = sub_product(sum[i][j], value(zeros[j], at),
                                      load(x + begin / kLaneCodes + at * kLanes));
            }
            master[i][j] = fma(sum[i][j], value(scales[j], at), master[i][j]);
          }
      };
      int64_t at = b;
      for (; at < last && (at + 1) * 4 * kLanes <= bytes; ++at) {
        if constexpr (kRows == kFewRows) {
#pragma GCC unroll 4
          for (int j = 0; j < kTogether; ++j) {
            const int64_t ahead = at * 4 * kLanes + kCodesAhead;
            __builtin_prefetch(from[j] + ahead + (ahead < bytes ? 0 : next), 0, 2);
          }
        }
        block(at, [](const uint8_t* p) __attribute__((always_inline)) { return load_codes(p); });
      }
      if (at < last) {
        const int64_t rest = bytes - at * 4 * kLanes;
        // Lanes behind the last code: nothing is read there, and nothing may be made of it.
        if (!kWholeBlocks)
          for (int j = 0; j < kTogether; ++j)
            for (int64_t lane = ceil_div(rest, 4); lane < kLanes; ++lane) {
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

template <bool kPairs, bool kZeros, bool kWholeBlocks>
void multiply_codes(const Operand& a, const float* rows, int64_t row_stride, int height,
                    int64_t line, int lines, int64_t begin, int64_t end, Vec* totals) {
  const Int4Columns& columns = int4_columns(a);
  const auto multiply = height == 1   ? rows_times_codes<kPairs, 1, kZeros, kWholeBlocks>
                        : height == 2 ? rows_times_codes<kPairs, 2, kZeros, kWholeBlocks>
                                      : rows_times_codes<kPairs, kFewRows, kZeros, kWholeBlocks>;
  for (int first = 0; first < lines; first += kLanes, totals += height)
    multiply(columns, rows, row_stride, line + first, lines - first, begin, end, totals);
}

template <bool kPairs>
auto codes_in_place(const Int4Weight& w) -> decltype(Operand::multiply) {
  const bool whole_blocks = w.group % kBlockCodes == 0;
  if (w.zero_kind != FT_ZERO_NONE)
    return whole_blocks ? multiply_codes<kPairs, true, true> : multiply_codes<kPairs, true, false>;
  return whole_blocks ? multiply_codes<kPairs, false, true> : multiply_codes<kPairs, false, false>;
}

// Few rows times the codes where they lie: bfloat16 x in pairs, any other in float32.
inline auto choose_codes_in_place(const Int4Weight& w, bool pairs) -> decltype(Operand::multiply) {
#if FT_BF16_DOT
  if (pairs) return codes_in_place<true>(w);
#else
  (void)pairs;
#endif
  return codes_in_place<false>(w);
}

}  // namespace
