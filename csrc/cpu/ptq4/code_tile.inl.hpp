// Register tiles that unpack codes as they multiply them: of pairs, in groups.
//
// Unpacking keeps the pipes that shuffle busy, products those that multiply: a panel unpacked ahead
// lets either wait for the other. Here they overlap.
namespace {

#if FT_BF16_DOT

// The codes of kLanes lines and kBlockCodes positions, transposed by eight steps of as many
// shuffles, to be done among other work.
struct Unpacking {
  Vec quarters[kLanes];  // vector 4 q + c: of lines 4 q .. 4 q + 3
  Vec lanes[2][kLanes];  // of the block at hand, and of the next
  int at_hand;

  FT_INLINE void step(const Int4Weight& w, int64_t from, int lines, int64_t at, int number) {
    number < 4 ? load_quarter(w, from, lines, at, number) : join_quarters(number - 4);
  }

 private:
  FT_INLINE void load_quarter(const Int4Weight& w, int64_t from, int lines, int64_t at, int q) {
    const uint8_t* row = w.codes + (from + 4 * q) * w.row_bytes + at / 2;
    const int64_t bytes = w.row_bytes - at / 2, ahead = 2 * kLanes * w.row_bytes;
    Vec v[4];
    if (lines >= kLanes && bytes >= 4 * kLanes) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i, row += w.row_bytes) {
        __builtin_prefetch(row + ahead, 0, 2);
        v[i] = as_floats(load_codes(row));
      }
    } else {
      for (int i = 0; i < 4; ++i, row += w.row_bytes)
        v[i] = 4 * q + i >= lines ? zero() : as_floats(load_codes(row, lesser(bytes, 4 * kLanes)));
    }
    const Vec low0 = _mm512_unpacklo_ps(v[0], v[1]), high0 = _mm512_unpackhi_ps(v[0], v[1]);
    const Vec low1 = _mm512_unpacklo_ps(v[2], v[3]), high1 = _mm512_unpackhi_ps(v[2], v[3]);
    quarters[4 * q] = _mm512_shuffle_ps(low0, low1, 0x44);
    quarters[4 * q + 1] = _mm512_shuffle_ps(low0, low1, 0xee);
    quarters[4 * q + 2] = _mm512_shuffle_ps(high0, high1, 0x44);
    quarters[4 * q + 3] = _mm512_shuffle_ps(high0, high1, 0xee);
  }

  FT_INLINE void join_quarters(int c) {
    Vec* const to = lanes[1 - at_hand] + c;
    const Vec* const v = quarters + c;
    const Vec even0 = _mm512_shuffle_f32x4(v[0], v[4], 0x88);
    const Vec odd0 = _mm512_shuffle_f32x4(v[0], v[4], 0xdd);
    const Vec even1 = _mm512_shuffle_f32x4(v[8], v[12], 0x88);
    const Vec odd1 = _mm512_shuffle_f32x4(v[8], v[12], 0xdd);
    to[0] = _mm512_shuffle_f32x4(even0, even1, 0x88);
    to[8] = _mm512_shuffle_f32x4(even0, even1, 0xdd);
    to[4] = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
    to[12] = _mm512_shuffle_f32x4(odd0, odd1, 0xdd);
  }
};
constexpr int kUnpackingSteps = 8;
static_assert(sizeof(Unpacking) <= kTileState * sizeof(float), "CodeTile::state holds it");

// kRows rows times one strip of lines, over values [begin, end) of depth; meanwhile the next codes
// are unpacked, at last those of the tile that follows.
template <int kRows>
void code_tile(const CodeTile& f, const Landing& to) {
  constexpr int kChains = kRows <= 6 ? 2 : 1;  // as the latency of a product wants
  const Int4Columns& columns = int4_columns(*f.columns);
  const Int4Weight& w = columns.w;
  const PairTable table = columns.pairs;
  const int64_t lanes_of_group = to.groups.items / 4;
  Unpacking& u = *static_cast<Unpacking*>(f.state);
  if (f.first) {
    u.at_hand = 0;
    for (int step = 0; step < kUnpackingSteps; ++step) u.step(w, f.line, f.lines, f.begin, step);
    u.at_hand = 1;
  }
  const float* rows = f.rows;
  int64_t group = 0;
  for (int64_t p = f.begin; p < f.end; p += kBlockCodes, u.at_hand = 1 - u.at_hand) {
    const bool last = p + kBlockCodes >= f.end;
    const int64_t next_line = last ? f.next_line : f.line;
    const int64_t next = last ? f.next_begin : p + kBlockCodes;
    const int next_lines = last ? f.next_lines : f.lines;
    const Vec* const lanes = u.lanes[u.at_hand];
    const int64_t used = lesser(kLanes, ceil_div(f.end - p, kLaneCodes));
    for (int64_t lane = 0; lane < used; ++group) {
      const int64_t end = lesser(used, lane + lanes_of_group);
      Vec sum[kChains][kRows][1];
#pragma GCC unroll 2
      for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) sum[c][i][0] = zero();
      for (; lane < end; ++lane, rows += 4 * kLanes) {
        for_each_code<4>([&](auto code) __attribute__((always_inline)) {
          const Vec column = look_up(table, from_code<code.value>(as_codes(lanes[lane])));
          auto& chain = sum[code.value % kChains];
#pragma GCC unroll 16
          for (int i = 0; i < kRows; ++i)
            chain[i][0] = dot_pairs(rows + code.value * kLanes + i, column, chain[i][0]);
        });
        if (lane % 2 && next_lines) u.step(w, next_line, next_lines, next, int(lane / 2));
      }
      if (kChains == 2)
#pragma GCC unroll 6
        for (int i = 0; i < kRows; ++i) sum[0][i][0] = add(sum[0][i][0], sum[kChains - 1][i][0]);
      to.template add_up_tile<kRows, 1>(group, sum[0]);
    }
    if (next_lines)
      for (int64_t step = used / 2; step < kUnpackingSteps; ++step)
        u.step(w, next_line, next_lines, next, int(step));
  }
}

// kRows rows times kStrips strips of lines. What is unpacked stays in f.panel, for the rows that
// follow.
template <int kRows, int kStrips>
void code_tile_kept(const CodeTile& f, const Landing& to) {
  const Int4Columns& columns = int4_columns(*f.columns);
  const PairTable table = columns.pairs;
  const int64_t lanes_of_group = to.groups.items / 4;
  const float* rows = f.rows;
  float* panel = f.panel;
  int64_t group = 0;
  for (int64_t p = f.begin; p < f.end; p += kBlockCodes) {
    Vec lanes[kStrips][kLanes];
#pragma GCC unroll 2
    for (int j = 0; j < kStrips; ++j)
      load_lanes(columns.w, f.line + j * kLanes, int(lesser(kLanes, f.lines - j * kLanes)), p,
                 lanes[j]);
    const int64_t used = lesser(kLanes, ceil_div(f.end - p, kLaneCodes));
    for (int64_t lane = 0; lane < used; ++group) {
      const int64_t end = lesser(used, lane + lanes_of_group);
      Vec sum[kRows][kStrips];
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < kStrips; ++j) sum[i][j] = zero();
      for (; lane < end; ++lane, rows += 4 * kLanes, panel += 4 * kLanes)
        for_each_code<4>([&](auto code) __attribute__((always_inline)) {
          Vec column[kStrips];
#pragma GCC unroll 2
          for (int j = 0; j < kStrips; ++j) {
            column[j] = look_up(table, from_code<code.value>(as_codes(lanes[j][lane])));
            store(panel + j * f.strip_floats + code.value * kLanes, column[j]);
          }
#pragma GCC unroll 16
          for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
            for (int j = 0; j < kStrips; ++j)
              sum[i][j] = dot_pairs(rows + code.value * kLanes + i, column[j], sum[i][j]);
        });
      to.template add_up_tile<kRows, kStrips>(group, sum);
    }
  }
}

inline Groups::Tile code_tile_of_height(int rows) {
  switch ((rows + 1) / 2) {
    case 1:
      return code_tile<2>;
    case 2:
      return code_tile<4>;
    case 3:
      return code_tile<6>;
    case 4:
      return code_tile<8>;
    case 5:
      return code_tile<10>;
    case 6:
      return code_tile<12>;
    case 7:
      return code_tile<14>;
    default:
      return code_tile<kTallRows>;
  }
}

// Several strips of rows are of more than half the height of one.
template <int kStrips>
Groups::Tile code_tile_kept_of_height(int rows) {
  switch ((rows + 1) / 2) {
    case 5:
      return code_tile_kept<10, kStrips>;
    case 6:
      return code_tile_kept<12, kStrips>;
    default:
      return code_tile_kept<kTileRows, kStrips>;
  }
}

// Groups::choose.
inline Groups::Tile choose_code_tile(int rows, int strips, bool kept) {
  if (!kept) return code_tile_of_height(rows);
  return strips == 1 ? code_tile_kept_of_height<1>(rows) : code_tile_kept_of_height<2>(rows);
}

#endif

}  // namespace
