// What the products over blocks share: a block-sparse weight as either side of it is gone through,
// and the register tile.
namespace {

// ---- the weight from one of its sides ------------------------------------------------------

// Lines are rows of W and depth its columns, or the other way round; edges are a block's.
struct BlockSide {
  const void* values;
  int64_t area, line_stride, depth_stride;  // of a block; strides within it
  int64_t lines, depth, line_edge, depth_edge;
  // Of each row of the grid the first entry, of each entry the place in depth and the block (null:
  // its own number), and the rows of the grid, those with the most entries first.
  const int32_t *offsets, *places, *blocks, *order;
  int32_t dtype;
  bool pairs;

  int64_t groups() const { return ceil_div(lines, line_edge); }
  int64_t count(int64_t group) const { return offsets[group + 1] - offsets[group]; }
  int64_t line(int64_t group) const { return group * line_edge; }
  int64_t lines_of(int64_t group) const { return lesser(line_edge, lines - line(group)); }
  int64_t block(int64_t entry) const { return blocks ? blocks[entry] : entry; }
  const void* data(int64_t entry) const { return advanced(values, dtype, block(entry) * area); }
  int64_t per_item() const { return pairs ? 2 : 1; }
  // Values of depth of an entry, and items of a whole block.
  int64_t values_of(int64_t entry) const {
    return lesser(depth_edge, depth - places[entry] * depth_edge);
  }
  int64_t items() const { return ceil_div(depth_edge, per_item()); }
  int64_t strips() const { return ceil_div(line_edge, kLanes); }
  // Floats of a packed block, and of all of a row of the grid before it.
  int64_t packed() const { return strips() * items() * kLanes; }
};

inline BlockSide side_of(const BlockSparseLinear& f, bool transposed) {
  const int64_t over_n = ceil_div(f.n, f.rows), over_k = ceil_div(f.k, f.columns);
  const int32_t* const by_rows = f.index;
  const int32_t* const by_columns = by_rows + over_n + 1 + f.blocks + over_n;
  const int32_t* const places = by_columns + over_k + 1 + f.blocks + over_k;
  const int64_t area = f.rows * f.columns, edge = transposed ? f.rows : f.columns;
  // A block whose edge is odd would begin within a pair.
  const bool pairs = FT_BF16_DOT && f.dtype == FT_BFLOAT16 && edge % 2 == 0;
  if (transposed)
    return {f.values,   area,
            1,          f.columns,
            f.k,        f.n,
            f.columns,  f.rows,
            by_columns, by_columns + over_k + 1,
            places,     by_columns + over_k + 1 + f.blocks,
            f.dtype,    pairs};
  return {f.values,  area,
          f.columns, 1,
          f.n,       f.k,
          f.rows,    f.columns,
          by_rows,   by_rows + over_n + 1,
          nullptr,   by_rows + over_n + 1 + f.blocks,
          f.dtype,   pairs};
}

// ---- the register tile ---------------------------------------------------------------------

// The height of all strips of so many rows: equal, even, and no more than a tile of two strips has.
inline int block_height(int64_t rows) {
  const int height = int(ceil_div(rows, greater(1, ceil_div(rows, kTileRows))));
  return height <= 1 ? 1 : height + height % 2;
}

// Of the depth of a tile's rows: `count` runs of `items` items, the one at places[i] beginning at
// item places[i] * items, all of them within `end`.
struct Runs {
  const int32_t* places;
  int64_t count, items, end;
};

// tile (+)= rows^T columns over the runs; the columns of a run lie run_floats after those of the
// run before, its second strip strip_floats after its first.
template <int kRows, int kStrips, bool kPairs>
void block_tile(const float* rows, const float* columns, int64_t strip_floats, int64_t run_floats,
                const Runs& runs, float* tile, bool accumulate) {
  Vec sum[kRows][kStrips];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kStrips; ++j) sum[i][j] = zero();
  for (int64_t run = 0; run < runs.count; ++run, columns += run_floats) {
    const int64_t first = runs.places[run] * runs.items;
    const int64_t items = lesser(runs.items, runs.end - first);
    const float* row_items = rows + first * kLanes;
    const float* column_items = columns;
    for (int64_t p = 0; p < items; ++p, row_items += kLanes, column_items += kLanes) {
      Vec column[kStrips];
#pragma GCC unroll 2
      for (int j = 0; j < kStrips; ++j) column[j] = load(column_items + j * strip_floats);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const Vec row = splat(row_items[i]);
#pragma GCC unroll 2
        for (int j = 0; j < kStrips; ++j)
          sum[i][j] = multiply_add<kPairs>(row, column[j], sum[i][j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kStrips; ++j) {
      float* at = tile + i * kTileColumns + j * kLanes;
      store(at, accumulate ? add(load(at), sum[i][j]) : sum[i][j]);
    }
}

using BlockTile = void (*)(const float*, const float*, int64_t, int64_t, const Runs&, float*, bool);

template <int kStrips, bool kPairs>
BlockTile block_tile_of_height(int rows) {
  switch ((rows + 1) / 2) {
    case 1:
      return block_tile<2, kStrips, kPairs>;
    case 2:
      return block_tile<4, kStrips, kPairs>;
#if FT_LANES >= 8
    case 3:
      return block_tile<6, kStrips, kPairs>;
#endif
#if FT_LANES >= 16
    case 4:
      return block_tile<8, kStrips, kPairs>;
    case 5:
      return block_tile<10, kStrips, kPairs>;
    case 6:
      return block_tile<12, kStrips, kPairs>;
#endif
    default:
      return block_tile<kTileRows, kStrips, kPairs>;
  }
}

inline BlockTile choose_block_tile(int rows, int64_t strips, bool pairs) {
#if FT_BF16_DOT
  if (pairs)
    return strips == 1 ? block_tile_of_height<1, true>(rows) : block_tile_of_height<2, true>(rows);
#else
  (void)pairs;
#endif
  return strips == 1 ? block_tile_of_height<1, false>(rows) : block_tile_of_height<2, false>(rows);
}

}  // namespace
