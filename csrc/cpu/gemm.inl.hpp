// The GEMM core: C[i, j] = sum over products q and depth p of rows_q[i, p] * columns_q[j, p].
//
// Both operands are packed in strips, and a register tile is one strip of at most kTileRows rows by
// one or two strips of columns. Where there are few rows, columns are read in place instead.
//
// An element of C is summed in one order, whatever the sizes of tiles and the number of threads:
// blocks of Product::block items, each from zero, added up in sequence. Blocks from zero also keep
// the rounding error at that of a short sum. A product may come first to be scaled and masked in
// float32 (the low-rank update) before the next is added.
#include "cpu/operand.inl.hpp"
#include "cpu/stream.inl.hpp"

namespace {

struct Product {
  Operand rows, columns;
  int64_t depth;
  bool pairs;     // items are two bf16 values; needs FT_BF16_DOT
  int64_t block;  // items summed up from zero, then added to what stands
};

struct Result {
  void* data;
  int64_t row_stride, column_stride;  // one of them is 1
  void (*store)(const Result&, const float* tile, int64_t i, int64_t j, int rows, int columns);
  const void* bias;  // one per column, of the result's dtype, or null
  // What the first product is multiplied by, and the mask that selects from it, or null.
  float scale;
  const uint8_t* mask;
  int64_t mask_row_stride;
};

// The register tile: kTileRows x 2 accumulators, 2 columns and 1 broadcast fill the register file
// (32 registers of AVX-512, 16 elsewhere) and hide the latency of the multiply-add.
constexpr int kTileRows = kLanes == 16 ? 14 : kLanes == 8 ? 6 : 4;
constexpr int kTileColumns = 2 * kLanes;
// Two column strips stay in the first-level cache while the rows' block, half of the second level,
// passes by.
constexpr int64_t kDepthItems = 384;
// The low-rank products are a small part of the work and a large part of the gradients' error.
// Not a power of two, or the packed strips would compete for the same sets of the cache.
constexpr int64_t kShortDepthItems = 72;
constexpr int kBlockRows = kTileRows * (224 / kTileRows);
// Packed operands larger than this are made in parts.
constexpr int64_t kPanelBytes = int64_t(16) << 20;
// Fewer multiply-adds than this are not worth waking a thread for.
constexpr int64_t kSerialWork = int64_t(1) << 18;

// The product of two dense operands. Both bf16: multiplied as pairs where the level can, otherwise
// widened to float32.
inline Product product(Operand rows, int32_t rows_dtype, Operand columns, int32_t columns_dtype,
                       int64_t depth, int64_t block = kDepthItems) {
  const bool pairs = FT_BF16_DOT && rows_dtype == FT_BFLOAT16 && columns_dtype == FT_BFLOAT16;
  choose_packer(rows, rows_dtype, pairs);
  choose_packer(columns, columns_dtype, pairs);
  columns.stream = choose_stream(columns, columns_dtype, pairs);
  return {rows, columns, depth, pairs, block};
}

// ---- register tiles ------------------------------------------------------------------------

template <bool kPairs>
FT_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
#if FT_BF16_DOT
  if constexpr (kPairs) return dot_pairs(a, b, c);
#endif
  return fma(a, b, c);
}

// tile (+)= rows^T columns over `items` items; column strips are column_strip floats apart. A tile
// of few rows deals the items out to several sums, to hide the latency of the multiply-add.
template <int kRows, int kStrips, bool kPairs>
void register_tile(const float* rows, const float* columns, int64_t column_strip, int64_t items,
                   float* tile, bool accumulate) {
  constexpr int kSums = kRows == 1 ? 4 : kRows == 2 ? 2 : 1;
  Vec sum[kSums][kRows][kStrips];
#pragma GCC unroll 4
  for (int s = 0; s < kSums; ++s)
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kStrips; ++j) sum[s][i][j] = zero();
  const auto add_item = [&](int s, int64_t p) __attribute__((always_inline)) {
    Vec column[kStrips];
#pragma GCC unroll 2
    for (int j = 0; j < kStrips; ++j) column[j] = load(columns + j * column_strip + p * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec row = splat(rows[p * kLanes + i]);
#pragma GCC unroll 2
      for (int j = 0; j < kStrips; ++j)
        sum[s][i][j] = multiply_add<kPairs>(row, column[j], sum[s][i][j]);
    }
  };
  int64_t p = 0;
  for (; p + kSums <= items; p += kSums)
#pragma GCC unroll 4
    for (int s = 0; s < kSums; ++s) add_item(s, p + s);
  for (; p < items; ++p) add_item(0, p);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kStrips; ++j) {
      Vec total = sum[0][i][j];
      if constexpr (kSums == 2) total = add(total, sum[1][i][j]);
      if constexpr (kSums == 4)
        total = add(add(total, sum[1][i][j]), add(sum[2][i][j], sum[3][i][j]));
      float* to = tile + i * kBlockColumns + j * kLanes;
      store(to, accumulate ? add(load(to), total) : total);
    }
}

using RegisterTile = void (*)(const float*, const float*, int64_t, int64_t, float*, bool);

// Strips of fewer rows run the next even height; the packed zeros below cost less than more code.
template <int kStrips, bool kPairs>
RegisterTile tile_of_height(int rows) {
  switch ((rows + 1) / 2) {
    case 1:
      return rows == 1 ? register_tile<1, kStrips, kPairs> : register_tile<2, kStrips, kPairs>;
    case 2:
      return register_tile<4, kStrips, kPairs>;
#if FT_LANES >= 8
    case 3:
      return register_tile<6, kStrips, kPairs>;
#endif
#if FT_LANES >= 16
    case 4:
      return register_tile<8, kStrips, kPairs>;
    case 5:
      return register_tile<10, kStrips, kPairs>;
    case 6:
      return register_tile<12, kStrips, kPairs>;
#endif
    default:
      return register_tile<kTileRows, kStrips, kPairs>;
  }
}

inline RegisterTile choose_tile(int rows, int strips, bool pairs) {
#if FT_BF16_DOT
  if (pairs) return strips == 1 ? tile_of_height<1, true>(rows) : tile_of_height<2, true>(rows);
#else
  (void)pairs;
#endif
  return strips == 1 ? tile_of_height<1, false>(rows) : tile_of_height<2, false>(rows);
}

// ---- results -------------------------------------------------------------------------------

// Scale the first product, and select from it what the mask keeps.
inline void scale_and_mask(const Result& c, float* tile, int64_t i, int64_t j, int rows,
                           int columns) {
  const Vec scale = splat(c.scale);
  for (int row = 0; row < rows; ++row, tile += kBlockColumns)
    for (int column = 0; column < columns; column += kLanes) {
      Vec v = mul(load(tile + column), scale);
      if (c.mask) v = select(v, keep_bits(c.mask, (i + row) * c.mask_row_stride + j + column));
      store(tile + column, v);
    }
}

template <class T>
void store_rows(const Result& c, const float* tile, int64_t i, int64_t j, int rows, int columns) {
  const T* bias = static_cast<const T*>(c.bias);
  for (int row = 0; row < rows; ++row, tile += kBlockColumns) {
    T* to = static_cast<T*>(c.data) + (i + row) * c.row_stride + j;
    for (int column = 0; column < columns; column += kLanes) {
      const int n = int(lesser(kLanes, columns - column));
      const Vec v = load(tile + column);
      store(to + column, bias ? add(v, load(bias + j + column, n)) : v, n);
    }
  }
}

template <class T>
void store_columns(const Result& c, const float* tile, int64_t i, int64_t j, int rows,
                   int columns) {
  for (int column = 0; column < columns; ++column) {
    T* to = static_cast<T*>(c.data) + (j + column) * c.column_stride + i;
    for (int row = 0; row < rows; ++row)
      to[row] = from_float<T>(tile[row * kBlockColumns + column]);
  }
}

// Where C goes: C-contiguous rows, or its transpose.
inline Result result(void* data, int32_t dtype, int64_t row_stride, int64_t column_stride,
                     float scale = 1.0f) {
  const bool rows = column_stride == 1;
  auto store = dtype == FT_FLOAT32    ? (rows ? store_rows<float> : store_columns<float>)
               : dtype == FT_BFLOAT16 ? (rows ? store_rows<bf16> : store_columns<bf16>)
                                      : (rows ? store_rows<fp16> : store_columns<fp16>);
  return {data, row_stride, column_stride, store, nullptr, scale, nullptr, 0};
}

// ---- the loops -----------------------------------------------------------------------------

// A range of lines cut into strips of equal height, packed as [block of depth][strip][item][lane].
struct Strips {
  int64_t begin, end;  // lines
  int height;

  int64_t count() const { return ceil_div(end - begin, height); }
  int64_t line(int64_t strip) const { return begin + strip * height; }
  int lines(int64_t strip) const { return int(lesser(height, end - line(strip))); }
};

inline int64_t items_of(const Product& q) { return q.pairs ? ceil_div(q.depth, 2) : q.depth; }

// Pack items [first, last) of strips [s0, s1) as [strip][item][lane].
inline void pack_strips(const Product& q, const Operand& a, const Strips& strips, int64_t s0,
                        int64_t s1, int64_t first, int64_t last, float* panel) {
  const int per_item = q.pairs ? 2 : 1;
  const int64_t run = a.short_runs ? kShortRun : last - first;
  for (int64_t p = first; p < last; p += run) {
    const int64_t end = lesser(lesser(p + run, last) * per_item, q.depth);
    for (int64_t s = s0; s < s1; ++s)
      a.pack(a, strips.line(s), strips.lines(s), p * per_item, end,
             panel + ((s - s0) * (last - first) + p - first) * kLanes);
  }
}

// Pack an operand of every product over its whole depth, in tasks of a few strips.
inline void pack_panels(const Product* products, int count, Operand Product::* operand,
                        const Strips& strips, float* const* panels, int threads) {
  const int64_t group = greater(1, lesser(kBlockColumns / kLanes, strips.count() / (4 * threads)));
  const int64_t tasks = ceil_div(strips.count(), group);
  parallel_for(tasks > 1 ? threads : 1, tasks, [&](int64_t task, int) {
    const int64_t s0 = task * group, s1 = lesser(s0 + group, strips.count());
    for (int q = 0; q < count; ++q) {
      const int64_t items = items_of(products[q]);
      for (int64_t p = 0; p < items; p += products[q].block) {
        const int64_t block = lesser(products[q].block, items - p);
        pack_strips(products[q], products[q].*operand, strips, s0, s1, p, p + block,
                    panels[q] + (p * strips.count() + s0 * block) * kLanes);
      }
    }
  });
}

constexpr int kMaxProducts = 2;

// One call of gemm: the products, and the packed panels of the part of C at hand.
struct Gemm {
  const Product* products;
  int count;
  const Result* c;
  Strips rows, columns;
  bool few_rows;  // columns that can be read in place are
  float* row_panels[kMaxProducts];
  float* column_panels[kMaxProducts];  // null: every tile packs its own columns
};

inline void clear(float* tile, int rows) {
  for (int at = 0; at < rows * kBlockColumns; ++at) tile[at] = 0.0f;
}

// Row strips [i0, i1) by column strips [j0, j1), at most kBlockRows x kBlockColumns.
inline void compute_block(const Gemm& g, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
                          float* tile, float* own_columns) {
  bool accumulate = false;
  const int64_t i = g.rows.line(i0), j = g.columns.line(j0);
  const int rows = int(lesser(g.rows.line(i1), g.rows.end) - i);
  const int columns = int(lesser(g.columns.line(j1), g.columns.end) - j);
  for (int q = 0; q < g.count; ++q) {
    const Product& product = g.products[q];
    const bool streamed = g.few_rows && product.columns.stream;
    if (streamed) {
      if (!accumulate) clear(tile, g.rows.height);
      product.columns.stream(product.columns, g.row_panels[q], rows, j, columns, product.depth,
                             tile);
      accumulate = true;
    }
    const int64_t items = streamed ? 0 : items_of(product);
    for (int64_t p = 0; p < items; p += product.block) {
      const int64_t block = lesser(product.block, items - p), strip_floats = block * kLanes;
      const float* row_block = g.row_panels[q] + p * g.rows.count() * kLanes;
      const float* column_block = own_columns;
      if (g.column_panels[q])
        column_block = g.column_panels[q] + p * g.columns.count() * kLanes + j0 * strip_floats;
      else
        pack_strips(product, product.columns, g.columns, j0, j1, p, p + block, own_columns);
      for (int64_t strip = j0; strip < j1; strip += 2, column_block += 2 * strip_floats) {
        const int strips = int(lesser(2, j1 - strip));
        float* to = tile + (strip - j0) * kLanes;
        for (int64_t s = i0; s < i1; ++s, to += g.rows.height * kBlockColumns)
          choose_tile(g.rows.lines(s), strips, product.pairs)(
              row_block + s * strip_floats, column_block, strip_floats, block, to, accumulate);
      }
      accumulate = true;
    }
    if (q == 0 && accumulate && (g.c->scale != 1.0f || g.c->mask))
      scale_and_mask(*g.c, tile, i, j, rows, columns);
  }
  if (!accumulate) clear(tile, rows);
  g.c->store(*g.c, tile, i, j, rows, columns);
}

inline float* panel_space(Scratch which, const Product* products, int count, const Strips& strips,
                          float** panels) {
  int64_t floats = 0;
  for (int q = 0; q < count; ++q) floats += items_of(products[q]) * strips.count() * kLanes;
  float* space = static_cast<float*>(scratch(which, (floats + 1) * int64_t(sizeof(float))));
  for (int q = 0; q < count; ++q) {
    panels[q] = space;
    space += items_of(products[q]) * strips.count() * kLanes;
  }
  return space;
}

// C = sum of the products, at most kMaxProducts, into c; C is rows x columns.
inline void gemm(int64_t rows, int64_t columns, const Product* products, int count, const Result& c,
                 int threads) {
  if (!rows || !columns) return;
  int64_t depth = 0;
  for (int q = 0; q < count; ++q) depth += items_of(products[q]);
  if (rows * columns * depth < kSerialWork) threads = 1;

  // Columns whose packed panel is used by one block of rows only are packed where they are used.
  const bool share_columns = rows > kBlockRows;
  const int64_t line_bytes = greater(depth, 1) * int64_t(sizeof(float));
  const int64_t columns_at_once =
      share_columns ? greater(int64_t(threads) * kBlockColumns, kPanelBytes / line_bytes) /
                          kBlockColumns * kBlockColumns
                    : columns;
  // Equal heights, and even ones: a tile of odd height would write a row of the next strip.
  const int height = int(ceil_div(rows, ceil_div(rows, kTileRows)));
  const int strip_height = height == 1 ? 1 : height + height % 2;
  const int64_t rows_at_once = greater(kBlockRows / strip_height * strip_height,
                                       kPanelBytes / (line_bytes * kLanes) * strip_height);

  constexpr int64_t kTile = int64_t(kBlockRows) * kBlockColumns;
  constexpr int64_t kWorker = kTile + kBlockColumns * kDepthItems;
  float* const workers =
      static_cast<float*>(scratch(Scratch::kWorkers, threads * kWorker * int64_t(sizeof(float))));

  Gemm g{products, count, &c, {0, 0, strip_height}, {0, 0, kLanes}, rows <= kStreamedRows, {}, {}};
  for (int64_t j = 0; j < columns; j += columns_at_once) {
    g.columns.begin = j;
    g.columns.end = lesser(columns, j + columns_at_once);
    if (share_columns) {
      panel_space(Scratch::kColumnPanels, products, count, g.columns, g.column_panels);
      pack_panels(products, count, &Product::columns, g.columns, g.column_panels, threads);
    }
    for (int64_t i = 0; i < rows; i += rows_at_once) {
      g.rows.begin = i;
      g.rows.end = lesser(rows, i + rows_at_once);
      panel_space(Scratch::kRowPanels, products, count, g.rows, g.row_panels);
      pack_panels(products, count, &Product::rows, g.rows, g.row_panels, threads);

      // Blocks of C of equal size, as many as keep all threads busy to the end.
      const int64_t row_strips = g.rows.count(), column_pairs = ceil_div(g.columns.count(), 2);
      const int64_t row_blocks = ceil_div(row_strips, kBlockRows / strip_height);
      int64_t column_blocks = ceil_div(g.columns.count(), kBlockColumns / kLanes);
      if (threads > 1) column_blocks = greater(column_blocks, ceil_div(4 * threads, row_blocks));
      const int64_t block_rows = ceil_div(row_strips, row_blocks);
      const int64_t block_columns = 2 * ceil_div(column_pairs, lesser(column_blocks, column_pairs));
      const int64_t across = ceil_div(g.columns.count(), block_columns);
      parallel_for(threads, row_blocks * across, [&](int64_t task, int worker) {
        const int64_t i0 = task / across * block_rows, j0 = task % across * block_columns;
        float* tile = workers + worker * kWorker;
        compute_block(g, i0, lesser(i0 + block_rows, g.rows.count()), j0,
                      lesser(j0 + block_columns, g.columns.count()), tile, tile + kTile);
      });
    }
  }
}

}  // namespace
