// The GEMM core: C[i, j] = sum over products q of
//   mask_q[i, j] ? scale_q * (sum over depth p of rows_q[i, p] * columns_q[j, p]) : 0.
//
// Both operands are packed in strips, and a register tile is one strip of at most kTileRows rows by
// one or two strips of columns. Where there are few rows, columns are read in place instead.
//
// An element of C is summed in one order, whatever the sizes of tiles, the number of threads, and
// whether an operand was packed before: blocks of Depth::block items, each from zero, scaled and
// masked in float32, added up in sequence. Blocks from zero also keep the rounding error at that of
// a short sum.
#include "cpu/pack.inl.hpp"
#include "cpu/stream.inl.hpp"

namespace {

struct Product {
  Operand rows, columns;
  Depth depth;
  float scale;          // of the sum
  const uint8_t* mask;  // selects from the scaled sum by element of C, or null
  int64_t mask_row_stride;
  int64_t mask_element = 0;  // the mask's index of the element (0, 0) of C
  // The rows of C that it is added to. The first product has them all.
  int64_t first_row = 0, end_row = INT64_MAX;
};

struct Result {
  void* data;
  int64_t row_stride, column_stride;  // one of them is 1
  void (*store)(const Result&, const float* tile, int64_t i, int64_t j, int rows, int columns);
  const void* bias;  // one per column, of the result's dtype, or null
  bool accumulate;   // added in float32 to what C holds, and rounded once
};

// The register tile: kTileRows x 2 accumulators, 2 columns and 1 broadcast fill the register file
// (32 registers of AVX-512, 16 elsewhere) and hide the latency of the multiply-add.
constexpr int kTileRows = kLanes == 16 ? 14 : kLanes == 8 ? 6 : 4;
constexpr int kTileColumns = 2 * kLanes;
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
  return {rows, columns, {depth, pairs, block}, 1.0f, nullptr, 0};
}

// The product's sum times `scale`, and of that what the mask of C's elements keeps.
inline Product scaled(Product q, float scale, const uint8_t* mask = nullptr,
                      int64_t mask_row_stride = 0) {
  q.scale = scale;
  q.mask = mask;
  q.mask_row_stride = mask_row_stride;
  return q;
}

// ---- register tiles ------------------------------------------------------------------------

template <bool kPairs>
FT_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
#if FT_BF16_DOT
  if constexpr (kPairs) return dot_pairs(a, b, c);
#endif
  return fma(a, b, c);
}

// What becomes of the sums of a register tile.
struct Landing {
  float* tile;      // rows of kBlockColumns floats
  bool accumulate;  // added to what stands there
  float scale;
  const uint8_t* mask;               // or null
  int64_t element, mask_row_stride;  // the mask's index of the tile's first element
  int64_t first_row, end_row;        // of the tile, that the sums are wanted of
};

// tile (+)= rows^T columns over `items` items; column strips are column_strip floats apart. A tile
// of few rows deals the items out to several sums, to hide the latency of the multiply-add.
template <int kRows, int kStrips, bool kPairs>
void register_tile(const float* rows, const float* columns, int64_t column_strip, int64_t items,
                   const Landing& to) {
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
  for (int i = 0; i < kRows; ++i) {
    if (i < to.first_row || i >= to.end_row) continue;
#pragma GCC unroll 2
    for (int j = 0; j < kStrips; ++j) {
      Vec total = sum[0][i][j];
      if constexpr (kSums == 2) total = add(total, sum[1][i][j]);
      if constexpr (kSums == 4)
        total = add(add(total, sum[1][i][j]), add(sum[2][i][j], sum[3][i][j]));
      total = mul(total, splat(to.scale));
      if (to.mask)
        total = select(total, keep_bits(to.mask, to.element + i * to.mask_row_stride + j * kLanes));
      float* at = to.tile + i * kBlockColumns + j * kLanes;
      store(at, to.accumulate ? add(load(at), total) : total);
    }
  }
}

using RegisterTile = void (*)(const float*, const float*, int64_t, int64_t, const Landing&);

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

template <class T>
void store_rows(const Result& c, const float* tile, int64_t i, int64_t j, int rows, int columns) {
  const T* bias = static_cast<const T*>(c.bias);
  for (int row = 0; row < rows; ++row, tile += kBlockColumns) {
    T* to = static_cast<T*>(c.data) + (i + row) * c.row_stride + j;
    for (int column = 0; column < columns; column += kLanes) {
      const int n = int(lesser(kLanes, columns - column));
      Vec v = load(tile + column);
      if (bias) v = add(v, load(bias + j + column, n));
      store(to + column, c.accumulate ? add(v, load(to + column, n)) : v, n);
    }
  }
}

template <class T>
void store_columns(const Result& c, const float* tile, int64_t i, int64_t j, int rows,
                   int columns) {
  for (int column = 0; column < columns; ++column) {
    T* to = static_cast<T*>(c.data) + (j + column) * c.column_stride + i;
    for (int row = 0; row < rows; ++row) {
      const float sum = tile[row * kBlockColumns + column];
      to[row] = from_float<T>(c.accumulate ? sum + to_float(to[row]) : sum);
    }
  }
}

// Where C goes: C-contiguous rows, or its transpose.
inline Result result(void* data, int32_t dtype, int64_t row_stride, int64_t column_stride) {
  const bool rows = column_stride == 1;
  auto store = dtype == FT_FLOAT32    ? (rows ? store_rows<float> : store_columns<float>)
               : dtype == FT_BFLOAT16 ? (rows ? store_rows<bf16> : store_columns<bf16>)
                                      : (rows ? store_rows<fp16> : store_columns<fp16>);
  return {data, row_stride, column_stride, store, nullptr, false};
}

// ---- the loops -----------------------------------------------------------------------------

// The height of all strips of so many rows: equal, and even, since a tile of odd height would write
// a row of the next strip.
inline int row_height(int64_t rows) {
  const int height = int(ceil_div(rows, greater(1, ceil_div(rows, kTileRows))));
  return height <= 1 ? 1 : height + height % 2;
}

// The rows of a product packed for any number of calls of gemm with as many rows, in a scratch
// buffer of the calling thread. For other products over the same operand, copy Product::rows.
inline void pack_rows(Product& q, int64_t rows, int threads) {
  const Strips strips{0, rows, row_height(rows)};
  float* const panel = static_cast<float*>(
      scratch(Scratch::kSharedRows, (panel_floats(q.depth, strips) + 1) * int64_t(sizeof(float))));
  const Packing packing{q.rows, q.depth, panel};
  pack_panels(&packing, 1, strips, threads);
  q.rows.panel = panel;
  q.rows.panel_strips = strips.count();
}

constexpr int kMaxProducts = 32;

// One call of gemm: the products, and the panels of the part of C at hand.
struct Gemm {
  const Product* products;
  int count;
  const Result* c;
  Strips rows, columns;
  bool few_rows;  // columns that can be read in place are
  Panel row_panels[kMaxProducts];
  Panel column_panels[kMaxProducts];  // no data: every tile packs its own columns
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
    const Panel &row_panel = g.row_panels[q], &column_panel = g.column_panels[q];
    const bool streamed = g.few_rows && product.columns.stream && !column_panel.data &&
                          product.scale == 1.0f && !product.mask && !product.first_row &&
                          product.end_row >= g.rows.end;
    if (streamed) {
      if (!accumulate) clear(tile, g.rows.height);
      product.columns.stream(product.columns, row_panel.at(0, 0, 0), rows, j, columns,
                             product.depth.values, tile);
      accumulate = true;
    }
    // What is used once is packed a tile at a time, unless neighbours share its memory.
    const int64_t at_once = product.columns.short_runs ? j1 - j0 : 2;
    const int64_t items = streamed ? 0 : product.depth.items();
    for (int64_t p = 0; p < items; p += product.depth.block) {
      const int64_t block = lesser(product.depth.block, items - p);
      for (int64_t strip = j0; strip < j1; strip += 2) {
        const int strips = int(lesser(2, j1 - strip));
        if (!column_panel.data && (strip - j0) % at_once == 0)
          pack_strips(product.columns, product.depth, g.columns, strip, lesser(strip + at_once, j1),
                      p, p + block, own_columns);
        const float* column_strips = column_panel.data
                                         ? column_panel.at(p, strip, block)
                                         : own_columns + (strip - j0) % at_once * block * kLanes;
        for (int64_t s = i0; s < i1; ++s) {
          const int64_t first = g.rows.line(s);
          if (first >= product.end_row || first + g.rows.lines(s) <= product.first_row) continue;
          const Landing to{
              tile + (first - i) * kBlockColumns + (strip - j0) * kLanes,
              accumulate,
              product.scale,
              product.mask,
              product.mask_element + first * product.mask_row_stride + g.columns.line(strip),
              product.mask_row_stride,
              product.first_row - first,
              lesser(g.rows.lines(s), product.end_row - first)};
          choose_tile(g.rows.lines(s), strips, product.depth.pairs)(
              row_panel.at(p, s, block), column_strips, block * kLanes, block, to);
        }
      }
      accumulate = true;
    }
  }
  if (!accumulate) clear(tile, rows);
  g.c->store(*g.c, tile, i, j, rows, columns);
}

// Panels of an operand of every product for some of its lines: those packed before and, if `all`,
// those packed now into a scratch buffer.
inline void make_panels(Scratch which, const Product* products, int count,
                        Operand Product::* operand, const Strips& strips, int threads, bool all,
                        Panel* panels) {
  Packing missing[kMaxProducts];
  int wanted = 0;
  int64_t floats = 0;
  for (int q = 0; q < count; ++q) {
    const Operand& a = products[q].*operand;
    panels[q] = {a.panel, a.panel_strips, strips.begin / strips.height};
    if (!a.panel && all) floats += panel_floats(products[q].depth, strips);
  }
  if (!floats) return;
  float* space = static_cast<float*>(scratch(which, floats * int64_t(sizeof(float))));
  for (int q = 0; q < count; ++q) {
    if (panels[q].data) continue;
    missing[wanted++] = {products[q].*operand, products[q].depth, space};
    panels[q] = {space, strips.count(), 0};
    space += panel_floats(products[q].depth, strips);
  }
  pack_panels(missing, wanted, strips, threads);
}

// C = sum of the products, at most kMaxProducts, into c; C is rows x columns.
inline void gemm(int64_t rows, int64_t columns, const Product* products, int count, const Result& c,
                 int threads) {
  if (!rows || !columns) return;
  int64_t depth = 0;
  for (int q = 0; q < count; ++q) depth += products[q].depth.items();
  if (rows * columns * depth < kSerialWork) threads = 1;

  // Columns whose packed panel is used by one block of rows only are packed where they are used.
  const bool share_columns = rows > kBlockRows;
  const int64_t line_bytes = greater(depth, 1) * int64_t(sizeof(float));
  const int64_t columns_at_once =
      share_columns ? greater(int64_t(threads) * kBlockColumns, kPanelBytes / line_bytes) /
                          kBlockColumns * kBlockColumns
                    : columns;
  const int strip_height = row_height(rows);
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
    make_panels(Scratch::kColumnPanels, products, count, &Product::columns, g.columns, threads,
                share_columns, g.column_panels);
    for (int64_t i = 0; i < rows; i += rows_at_once) {
      g.rows.begin = i;
      g.rows.end = lesser(rows, i + rows_at_once);
      make_panels(Scratch::kRowPanels, products, count, &Product::rows, g.rows, threads, true,
                  g.row_panels);

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
