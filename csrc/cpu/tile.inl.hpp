// Register tiles: a strip of rows by one or two strips of columns, over a block of depth, and where
// their sums go.
#include "cpu/few_rows.inl.hpp"

namespace {

// The register tile: kTileRows x 2 accumulators, 2 columns and 1 broadcast fill the register file
// (32 registers of AVX-512, 16 elsewhere) and hide the latency of the multiply-add.
constexpr int kTileRows = kLanes == 16 ? 14 : kLanes == 8 ? 6 : 4;
constexpr int kTileColumns = 2 * kLanes;
// The most rows of a tile of one strip: as many as a packed item has lanes.
constexpr int kTallRows = kLanes == 16 ? 16 : kTileRows;

struct Landing;
struct CodeTile;

// Depth in groups, whose sums are scaled in float32, by column, before they are added up. With
// zeros a group's sum is lessened first by the column's zero times the sum of the group's row of
// items.
struct Groups {
  int64_t items;  // in a group; the last may be short
  // The scales, and where there are any the zeros, of so many lines of the columns from `line` on
  // and groups [first, last), as [group][strip][lane] of two strips.
  void (*read)(const void* source, int64_t line, int lines, int64_t first, int64_t last,
               float* scales, float* zeros);
  const void* source;
  const float* row_sums;  // [row][group], or null: there are no zeros
  int64_t row_stride;     // of row_sums
  // The tile of the first strip of rows where it unpacks the columns as it multiplies them, and
  // with `kept` leaves them for the others; choose is null where they must be packed ahead.
  using Tile = void (*)(const CodeTile&, const Landing&);
  Tile (*choose)(int rows, int strips, bool kept);
};

// What such a tile is given.
struct CodeTile {
  const Operand* columns;
  int64_t line;  // of the columns
  int lines;
  int64_t begin, end;  // of depth, in values
  const float* rows;   // packed
  float* panel;        // for what is kept, in strips that are strip_floats apart
  int64_t strip_floats;
  // Without `kept`, one strip at a time: what the tile after this one has, of no lines if there is
  // none, and what a tile leaves for that one; the first one finds nothing.
  int64_t next_line;
  int next_lines;
  int64_t next_begin;
  bool first;
  void* state;
};
constexpr int64_t kTileState = (3 * kLanes + 1) * kLanes;

// The part of Groups that a register tile lands on.
struct GroupedLanding {
  int64_t first_items, items;   // in the tile's first group, and in those after it
  const float *scales, *zeros;  // [group][strip][lane]
  const float* row_sums;        // of the tile's first row and group
  int64_t row_stride;
};

// What becomes of the sums of a register tile.
struct Landing {
  float* tile;
  int64_t pitch;    // floats between its rows
  bool accumulate;  // added to what stands there
  float scale;
  const uint8_t* mask;               // or null
  int64_t element, mask_row_stride;  // the mask's index of the tile's first element
  int64_t first_row, end_row;        // of the tile, that the sums are wanted of
  GroupedLanding groups;

  // Strip j of row i.
  FT_INLINE void add_up(int i, int j, Vec total) const {
    total = mul(total, splat(scale));
    if (mask) total = select(total, keep_bits(mask, element + i * mask_row_stride + j * kLanes));
    float* at = tile + i * pitch + j * kLanes;
    store(at, accumulate ? add(load(at), total) : total);
  }

  // The sums of a group, counted from the first of the tile's.
  template <int kRows, int kStrips>
  FT_INLINE void add_up_tile(int64_t group, const Vec (&sum)[kRows][kStrips]) const {
    const bool whole = first_row <= 0 && end_row >= kRows;
    Vec scales[kStrips], zeros[kStrips];
#pragma GCC unroll 2
    for (int j = 0; j < kStrips; ++j) {
      const int64_t strip = (2 * group + j) * kLanes;
      scales[j] = load(groups.scales + strip);
      zeros[j] = groups.row_sums ? load(groups.zeros + strip) : zero();
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      if (!whole && (i < first_row || i >= end_row)) continue;
#pragma GCC unroll 2
      for (int j = 0; j < kStrips; ++j) {
        Vec total = sum[i][j];
        if (groups.row_sums)
          total =
              sub_product(total, zeros[j], splat(groups.row_sums[i * groups.row_stride + group]));
        float* const at = tile + i * pitch + j * kLanes;
        store(at, accumulate || group ? fma(total, scales[j], load(at)) : mul(total, scales[j]));
      }
    }
  }
};

// tile (+)= rows^T columns over `items` items; column strips are column_strip floats apart.
template <int kRows, int kStrips, bool kPairs, bool kGrouped>
void register_tile(const float* rows, const float* columns, int64_t column_strip, int64_t items,
                   Ahead ahead, const Landing& to) {
  int64_t p = 0, group = 0, end = kGrouped ? lesser(items, to.groups.first_items) : items;
  do {
    Vec sum[kRows][kStrips];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kStrips; ++j) sum[i][j] = zero();
    for (; p < end; ++p) {
      Vec column[kStrips];
#pragma GCC unroll 2
      for (int j = 0; j < kStrips; ++j) {
        if (!kGrouped) __builtin_prefetch(ahead.at + j * ahead.strip, 0, 2);
        column[j] = load(columns + j * column_strip + p * kLanes);
      }
      if (!kGrouped) ahead.at += (p + 1) % kLanes ? ahead.step : ahead.step + ahead.jump;
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < kStrips; ++j)
          sum[i][j] = multiply_add<kPairs>(rows + p * kLanes + i, column[j], sum[i][j]);
    }
    if constexpr (kGrouped) {
      to.template add_up_tile<kRows, kStrips>(group, sum);
      end = lesser(items, end + to.groups.items);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        if (i < to.first_row || i >= to.end_row) continue;
#pragma GCC unroll 2
        for (int j = 0; j < kStrips; ++j) to.add_up(i, j, sum[i][j]);
      }
    }
    ++group;
  } while (kGrouped && p < items);
}

using RegisterTile = void (*)(const float*, const float*, int64_t, int64_t, Ahead, const Landing&);

// Strips of fewer rows run the next even height; the packed zeros below cost less than more code.
template <int kStrips, bool kPairs, bool kGrouped>
RegisterTile tile_of_height(int rows) {
  switch ((rows + 1) / 2) {
    case 1:
      return register_tile<2, kStrips, kPairs, kGrouped>;
    case 2:
      return register_tile<4, kStrips, kPairs, kGrouped>;
#if FT_LANES >= 8
    case 3:
      return register_tile<6, kStrips, kPairs, kGrouped>;
#endif
#if FT_LANES >= 16
    case 4:
      return register_tile<8, kStrips, kPairs, kGrouped>;
    case 5:
      return register_tile<10, kStrips, kPairs, kGrouped>;
    case 6:
      return register_tile<12, kStrips, kPairs, kGrouped>;
    case 8:
      return register_tile<kTallRows, 1, kPairs, kGrouped>;
#endif
    default:
      return register_tile<kTileRows, kStrips, kPairs, kGrouped>;
  }
}

template <bool kPairs, bool kGrouped>
RegisterTile tile_of(int rows, int strips) {
  return strips == 1 ? tile_of_height<1, kPairs, kGrouped>(rows)
                     : tile_of_height<2, kPairs, kGrouped>(rows);
}

// Only pairs come in groups: scales of float32 columns are multiplied in where they are packed.
inline RegisterTile choose_tile(int rows, int strips, bool pairs, bool grouped) {
#if FT_BF16_DOT
  if (grouped) return tile_of<true, true>(rows, strips);
  if (pairs) return tile_of<true, false>(rows, strips);
#else
  (void)pairs;
  (void)grouped;
#endif
  return tile_of<false, false>(rows, strips);
}

}  // namespace
