// The GEMM core: C[i, j] = sum over products q of
//   mask_q[i, j] ? scale_q * (sum over depth p of rows_q[i, p] * columns_q[j, p]) : 0.
//
// Both operands are packed in strips, and a register tile is one strip of at most kTileRows rows by
// one or two strips of columns.
//
// An element of C is summed in one order, whatever the sizes of tiles, the number of threads, and
// whether an operand was packed before: blocks of Depth::block items, each from zero, scaled and
// masked in float32, added up in sequence. Blocks from zero also keep the rounding error at that of
// a short sum.
#include "cpu/tile.inl.hpp"

namespace {

struct Product {
  Operand rows, columns;
  Depth depth;
  float scale;          // of the sum
  const uint8_t* mask;  // selects from the scaled sum by element of C, or null
  int64_t mask_row_stride;
  int64_t mask_element = 0;  // the mask's index of the element (0, 0) of C
  // Where columns are not multiplied as they lie by Operand::multiply, which scales by itself.
  const Groups* groups = nullptr;
  // The rows of C that it is added to. The first product has them all.
  int64_t first_row = 0, end_row = INT64_MAX;
};

struct Result {
  void* data;
  int64_t row_stride, column_stride;  // one of them is 1
  void (*store)(const Result&, const float* tile, int64_t pitch, int64_t i, int64_t j, int rows,
                int columns);
  const void* bias;  // one per column, of the result's dtype, or null
  bool accumulate;   // added in float32 to what C holds, and rounded once
};

// Strips of neighbouring lines that are packed together where nobody else needs them.
constexpr int64_t kStripsAcross = 8;
constexpr int kBlockRows = kTileRows * (224 / kTileRows);
// The fewest items in a group of depth.
constexpr int64_t kLeastGroupItems = 4;
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
  if (!columns.pack && !columns.panel)
    columns.multiply = choose_in_place(columns, columns_dtype, pairs);
  choose_packer(columns, columns_dtype, pairs);
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

// ---- results -------------------------------------------------------------------------------

template <class T>
void store_rows(const Result& c, const float* tile, int64_t pitch, int64_t i, int64_t j, int rows,
                int columns) {
  const T* bias = static_cast<const T*>(c.bias);
  for (int row = 0; row < rows; ++row, tile += pitch) {
    T* to = static_cast<T*>(c.data) + (i + row) * c.row_stride + j;
    for (int column = 0; column < columns; column += kLanes) {
      const int n = int(lesser(kLanes, columns - column));
      Vec v = load(tile + column);
      if (bias) v = add(v, load(bias + j + column, n));
      store(to + column, c.accumulate ? add(v, load(to + column, n)) : v, n);
    }
  }
}

// Transposed in registers, a square at a time.
template <class T>
void store_columns(const Result& c, const float* tile, int64_t pitch, int64_t i, int64_t j,
                   int rows, int columns) {
  for (int row = 0; row < rows; row += kLanes)
    for (int column = 0; column < columns; column += kLanes) {
      const int n = int(lesser(kLanes, rows - row)), across = int(lesser(kLanes, columns - column));
      Vec square[kLanes];
#pragma GCC unroll 16
      for (int at = 0; at < kLanes; ++at)
        square[at] = at < n ? load(tile + (row + at) * pitch + column) : zero();
      transpose(square);
      T* to = static_cast<T*>(c.data) + (j + column) * c.column_stride + i + row;
      for (int at = 0; at < across; ++at, to += c.column_stride)
        store(to, c.accumulate ? add(square[at], load(to, n)) : square[at], n);
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
// a row of the next strip. One tall strip rather than two.
inline int row_height(int64_t rows) {
  const int64_t most = rows <= kTallRows ? kTallRows : kTileRows;
  const int height = int(ceil_div(rows, greater(1, ceil_div(rows, most))));
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
  bool few_rows;
  Panel row_panels[kMaxProducts];
  Panel column_panels[kMaxProducts];  // no data: every tile packs its own columns
};

// Where strip `strip` of C's columns in row strip s goes.
inline Landing landing(const Gemm& g, const Product& q, int64_t s, int64_t strip, bool accumulate,
                       float* tile, int64_t pitch) {
  return {tile,
          pitch,
          accumulate,
          q.scale,
          q.mask,
          q.mask_element + g.rows.line(s) * q.mask_row_stride + g.columns.line(strip),
          q.mask_row_stride,
          greater(0, q.first_row - g.rows.line(s)),
          lesser(g.rows.lines(s), q.end_row - g.rows.line(s)),
          {}};
}

// What a worker of gemm needs: a block of C, columns it packs itself, rows that it reorders, and
// the scales and zeros of two strips of columns.
struct Workspace {
  float *tile, *columns, *rows, *scales, *zeros, *state;

  static constexpr int64_t kTile = int64_t(kBlockRows) * kBlockColumns;
  static constexpr int64_t kColumns = kStripsAcross * kLanes * kDepthItems;
  static constexpr int64_t kRows = kFewRows * kMostRowItems;
  static constexpr int64_t kScales = 2 * kLanes * (kDepthItems / kLeastGroupItems + 2);
  static constexpr int64_t kFloats = kTile + kColumns + kRows + 2 * kScales + kTileState;

  explicit Workspace(float* at)
      : tile(at),
        columns(tile + kTile),
        rows(columns + kColumns),
        scales(rows + kRows),
        zeros(scales + kScales),
        state(zeros + kScales) {}
};

// The groups of a block of depth from item p on, for two strips of columns from `line` on.
inline GroupedLanding read_groups(const Groups& groups, int64_t line, int lines, int64_t p,
                                  int64_t block, const Workspace& work) {
  const int64_t first = p / groups.items, last = ceil_div(p + block, groups.items);
  groups.read(groups.source, line, lines, first, last, work.scales, work.zeros);
  return {(first + 1) * groups.items - p,
          groups.items,
          work.scales,
          work.zeros,
          groups.row_sums ? groups.row_sums + first : nullptr,
          groups.row_stride};
}

// Add product q to row strips [i0, i1) by column strips [j0, j1) of the workspace's tile.
inline void add_product(const Gemm& g, const Product& product, const Panel& row_panel,
                        const Panel& panel, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
                        bool accumulate, const Workspace& work) {
  const Operand& a = product.columns;
  const int64_t items = product.depth.items(), pitch = (j1 - j0) * kLanes;
  // Columns used once are packed a little at a time: two strips, or some that share their memory.
  const int64_t group = panel.data ? j1 - j0 : a.short_runs ? kStripsAcross : 2;
  const bool as_multiplied = product.groups && product.groups->choose;
  const bool kept = i1 - i0 > 1;
  const int64_t across = g.rows.height > kTileRows || (as_multiplied && !kept) ? 1 : 2;
  const int per_item = product.depth.pairs ? 2 : 1;
  const auto lines_of = [&](int64_t strip) {
    return int(lesser(lesser(across, j1 - strip) * kLanes, g.columns.end - g.columns.line(strip)));
  };
  for (int64_t p = 0; p < items; p += product.depth.block) {
    const int64_t block = lesser(product.depth.block, items - p), next = p + block;
    for (int64_t strip = j0; strip < j1; strip += across) {
      const int64_t within = (strip - j0) % group;
      if (!panel.data && !as_multiplied && within == 0)
        pack_strips(a, product.depth, g.columns, strip, lesser(strip + group, j1), p, next,
                    work.columns);
      const float* columns =
          panel.data ? panel.at(p, strip, block) : work.columns + within * block * kLanes;
      // What comes next is fetched from memory meanwhile.
      Ahead ahead = ahead_of(columns, 0);
      if (panel.data && strip + across < j1)
        ahead = ahead_of(panel.at(p, strip + across, block), block);
      else if (panel.data && next < items)
        ahead = ahead_of(panel.at(next, j0, lesser(block, items - next)), block);
      else if (strip + group < j1)
        ahead = ahead_of(a, product.depth, g.columns.line(strip + group), p);
      else if (next < items)
        ahead = ahead_of(a, product.depth, g.columns.line(j0 + within), next);
      const int strips = int(lesser(across, j1 - strip));
      const int64_t line = g.columns.line(strip);
      const int lines = lines_of(strip);
      GroupedLanding groups{};
      if (product.groups) groups = read_groups(*product.groups, line, lines, p, block, work);
      bool packed = !as_multiplied;
      for (int64_t s = i0; s < i1; ++s) {
        const int64_t row = g.rows.line(s) - g.rows.line(i0);
        if (g.rows.line(s) >= product.end_row ||
            g.rows.line(s) + g.rows.lines(s) <= product.first_row)
          continue;
        Landing to = landing(g, product, s, strip, accumulate || p > 0,
                             work.tile + row * pitch + (strip - j0) * kLanes, pitch);
        if (product.groups) {
          to.groups = groups;
          if (groups.row_sums) to.groups.row_sums += g.rows.line(s) * groups.row_stride;
        }
        const float* const rows = row_panel.at(p, s, block);
        if (!packed) {
          const int64_t after = strip + across < j1 ? strip + across : j0;
          const int64_t after_item = after > strip ? p : next;
          product.groups->choose(g.rows.lines(s), strips, kept)(
              {&a, line, lines, p * per_item, lesser(next * per_item, product.depth.values), rows,
               work.columns, block * kLanes, g.columns.line(after),
               after_item < items ? lines_of(after) : 0, after_item * per_item,
               p == 0 && strip == j0, work.state},
              to);
          packed = true;
          continue;
        }
        choose_tile(g.rows.lines(s), strips, product.depth.pairs, product.groups != nullptr)(
            rows, columns, block * kLanes, block, ahead, to);
      }
    }
  }
}

// The same for the only row strip of a C of few rows.
inline void add_few_rows(const Gemm& g, const Product& product, const Panel& row_panel,
                         const Panel& panel, int64_t j0, int64_t j1, bool accumulate,
                         const Workspace& work) {
  const Operand& a = product.columns;
  const Depth& depth = product.depth;
  const int height = g.rows.height, per_item = depth.pairs ? 2 : 1;
  const int64_t items = depth.items(), pitch = (j1 - j0) * kLanes;
  const int64_t span = kMostRowItems / depth.block * depth.block;
  const bool in_order = product.rows.in_order;
  const int64_t row_stride = in_order ? product.rows.line_stride / per_item : kMostRowItems;
  for (int64_t begin = 0; begin < items; begin += span) {
    const int64_t end = lesser(items, begin + span);
    if (!in_order)
      for (int64_t p = begin; p < end; ++p)
        for (int i = 0; i < height; ++i)
          work.rows[i * kMostRowItems + p - begin] = row_panel.at(p, 0, 1)[i];
    const bool in_place = !panel.data && a.multiply;
    const int64_t together = in_place ? kStripsTogether : 1;
    for (int64_t strip = j0; strip < j1; strip += together)
      for (int64_t p = begin; p < end; p += depth.block) {
        const int64_t block = lesser(depth.block, items - p), last = lesser(strip + together, j1);
        const float* rows =
            in_order ? static_cast<const float*>(product.rows.data) + p : work.rows + p - begin;
        Vec totals[kStripsTogether * kFewRows];
        if (in_place) {
          const int64_t line = g.columns.line(strip);
          a.multiply(a, rows, row_stride, height, line,
                     int(lesser(g.columns.line(last), g.columns.end) - line), p * per_item,
                     lesser((p + block) * per_item, depth.values), totals);
        } else {
          if (!panel.data)
            pack_strips(a, depth, g.columns, strip, last, p, p + block, work.columns);
          const PackedItems columns{panel.data ? panel.at(p, strip, block) : work.columns,
                                    panel.data ? block * kLanes : 0};
          rows_times_packed(rows, row_stride, height, columns, block, depth.pairs, totals);
        }
        for (int64_t s = strip; s < last; ++s) {
          const Landing to =
              landing(g, product, 0, s, accumulate || p > 0, work.tile + (s - j0) * kLanes, pitch);
          for (int64_t i = to.first_row; i < to.end_row; ++i)
            to.add_up(int(i), 0, totals[(s - strip) * height + i]);
        }
      }
  }
}

// Row strips [i0, i1) by column strips [j0, j1) of C, as many as the workspace holds.
inline void compute_block(const Gemm& g, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
                          const Workspace& work) {
  const int64_t i = g.rows.line(i0), j = g.columns.line(j0), pitch = (j1 - j0) * kLanes;
  const int rows = int(lesser(g.rows.line(i1), g.rows.end) - i);
  const int columns = int(lesser(g.columns.line(j1), g.columns.end) - j);
  bool accumulate = false;
  for (int q = 0; q < g.count; ++q) {
    if (g.few_rows)
      add_few_rows(g, g.products[q], g.row_panels[q], g.column_panels[q], j0, j1, accumulate, work);
    else
      add_product(g, g.products[q], g.row_panels[q], g.column_panels[q], i0, i1, j0, j1, accumulate,
                  work);
    accumulate = accumulate || g.products[q].depth.values > 0;
  }
  if (!accumulate)
    for (int64_t at = 0; at < rows * pitch; ++at) work.tile[at] = 0.0f;
  g.c->store(*g.c, work.tile, pitch, i, j, rows, columns);
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
    if (!a.panel && all && !a.used_once && !a.in_order)
      floats += panel_floats(products[q].depth, strips);
  }
  if (!floats) return;
  float* space = static_cast<float*>(scratch(which, floats * int64_t(sizeof(float))));
  for (int q = 0; q < count; ++q) {
    const Operand& a = products[q].*operand;
    if (panels[q].data || a.used_once || a.in_order) continue;
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

  float* const workers = static_cast<float*>(
      scratch(Scratch::kWorkers, threads * Workspace::kFloats * int64_t(sizeof(float))));

  Gemm g{products, count, &c, {0, 0, strip_height}, {0, 0, kLanes}, rows <= kFewRows, {}, {}};
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

      // Blocks of C of one size, to a strip, and as many for one thread as for another.
      const int64_t row_strips = g.rows.count(), column_pairs = ceil_div(g.columns.count(), 2);
      const int64_t row_blocks = ceil_div(row_strips, kBlockRows / strip_height);
      const int64_t most_columns = g.few_rows ? Workspace::kTile / kFewRows : kBlockColumns;
      int64_t column_blocks = ceil_div(g.columns.count(), most_columns / kLanes);
      // Few rows that have to be put in order are, for every block.
      const int64_t tasks = (!g.few_rows ? 4 : products[0].rows.in_order ? 8 : 1) * threads;
      if (threads > 1) column_blocks = greater(column_blocks, ceil_div(tasks, row_blocks));
      while (row_blocks * column_blocks % threads && row_blocks * column_blocks < 16 * threads)
        ++column_blocks;
      column_blocks = lesser(column_blocks, column_pairs);
      parallel_for(threads, row_blocks * column_blocks, [&](int64_t task, int worker) {
        const int64_t i = task / column_blocks, j = task % column_blocks;
        float* const own = workers + worker * Workspace::kFloats;
        compute_block(g, i * row_strips / row_blocks, (i + 1) * row_strips / row_blocks,
                      j * column_pairs / column_blocks * 2,
                      lesser((j + 1) * column_pairs / column_blocks * 2, g.columns.count()),
                      Workspace(own));
      });
    }
  }
}

// db = sum over m of grad, whose transpose is given: a row of ones times grad, so that the sum has
// the core's order and small error.
inline void sum_rows(const Operand& grad_t, int64_t m, int64_t n, void* db, int32_t dtype,
                     int threads) {
  const uint16_t bf16_one = 0x3f80, fp16_one = 0x3c00;
  const float one = 1.0f;
  const void* ones = dtype == FT_FLOAT32    ? static_cast<const void*>(&one)
                     : dtype == FT_BFLOAT16 ? static_cast<const void*>(&bf16_one)
                                            : static_cast<const void*>(&fp16_one);
  const Product sum = product(dense(ones, 0, 0), dtype, grad_t, dtype, m, kShortDepthItems);
  gemm(1, n, &sum, 1, result(db, dtype, n, 1), threads);
}

}  // namespace
