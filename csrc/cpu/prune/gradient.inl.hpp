// dvalues = dY^T X at the blocks that there are. dY and X are packed for some hundred tokens, cut
// into strips that end with every block; a register tile then needs nothing but two strips.
namespace {

// Items of tokens that are packed and multiplied at once.
constexpr int64_t kTokenItems = 512;

// One operand of dvalues for one part of the tokens: the lines of W's rows, or columns, cut into
// strips that end with every block, as [strip][item][lane].
struct EdgeStrips {
  int64_t lines, edge;
  int height;

  int64_t per_block() const { return ceil_div(edge, height); }
  int64_t count() const { return ceil_div(lines, edge) * per_block(); }
  int64_t line(int64_t strip) const {
    return strip / per_block() * edge + strip % per_block() * height;
  }
  // Lines of a strip that lie in its block and in W.
  int64_t within(int64_t strip) const {
    const int64_t first = strip % per_block() * height;
    return greater(0, lesser(lesser(height, edge - first), lines - line(strip)));
  }
};

// Tokens [begin, end), so many to an item, of strips [s0, s1): neighbours in memory, a few tokens
// of all before the next.
inline void pack_edges(const EdgeStrips& e, const Operand& a, int64_t begin, int64_t end,
                       int64_t per_item, int64_t s0, int64_t s1, float* panel) {
  const int64_t items = ceil_div(end - begin, per_item);
  const int64_t run = a.short_runs ? kShortRun * per_item : end - begin;
  for (int64_t p = begin; p < end; p += run)
    for (int64_t s = s0; s < s1; ++s)
      a.pack(a, e.line(s), int(e.within(s)), p, lesser(p + run, end),
             panel + (s * items + (p - begin) / per_item) * kLanes);
}

// What the blocks of one row of the grid gain from a part of the tokens.
struct EdgeProduct {
  const BlockSide& w;
  EdgeStrips rows, columns;
  const float *row_panel, *column_panel;
  int64_t items;
  bool pairs;
  void* sums;  // of the blocks' shape
  int32_t dtype;
  bool accumulate;

  void add_group(int64_t group) const {
    const int32_t from_first = 0;
    const Runs runs{&from_first, 1, items, items};
    const int64_t row = group * rows.per_block(), strip_floats = items * kLanes;
    for (int64_t entry = w.offsets[group]; entry < w.offsets[group + 1]; ++entry) {
      const int64_t column = w.places[entry] * columns.per_block();
      Result to = result(advanced(sums, dtype, entry * w.area), dtype, w.depth_edge, 1);
      to.accumulate = accumulate;
      for (int64_t j = 0; j < columns.per_block() && columns.within(column + j); j += 2) {
        const int64_t width = lesser(2, columns.per_block() - j);
        const int64_t second = width > 1 ? columns.within(column + j + 1) : 0;
        for (int64_t i = 0; i < rows.per_block() && rows.within(row + i); ++i) {
          const int high = int(rows.within(row + i));
          float tile[kTileRows * kTileColumns];
          choose_block_tile(high, width, pairs)(row_panel + (row + i) * strip_floats,
                                                column_panel + (column + j) * strip_floats,
                                                strip_floats, 0, runs, tile, false);
          to.store(to, tile, kTileColumns, i * rows.height, j * kLanes, high,
                   int(columns.within(column + j) + second));
        }
      }
    }
  }
};

template <class T>
void round_sums(const float* sums, int64_t count, void* values, int threads) {
  constexpr int64_t kTask = int64_t(1) << 14;
  parallel_for(threads, ceil_div(count, kTask), [&](int64_t task, int) {
    const int64_t end = lesser(count, (task + 1) * kTask);
    for (int64_t i = task * kTask; i < end; i += kLanes) {
      const int n = int(lesser(kLanes, end - i));
      store(static_cast<T*>(values) + i, load(sums + i, n), n);
    }
  });
}

inline void block_gradient(const BlockSparseLinear& f, const BlockSide& w, int threads) {
  const int64_t count = f.blocks * w.area;
  if (!count) return;
  if (count * f.m < kSerialWork) threads = 1;
  const bool pairs = FT_BF16_DOT && f.dtype == FT_BFLOAT16;
  const int64_t per_item = pairs ? 2 : 1, most = kTokenItems * per_item;
  Operand y = dense(f.grad, f.grad_stride_n, f.grad_stride_m);
  Operand x = dense(f.x, f.x_stride_k, f.x_stride_m);
  choose_packer(y, f.dtype, pairs);
  choose_packer(x, f.dtype, pairs);
  const EdgeStrips rows{f.n, f.rows, block_height(f.rows)}, columns{f.k, f.columns, kLanes};
  const int64_t strip_bytes =
      lesser(kTokenItems, ceil_div(f.m, per_item)) * kLanes * int64_t(sizeof(float));
  float* const row_panel =
      static_cast<float*>(scratch(Scratch::kRowPanels, rows.count() * strip_bytes + 1));
  float* const column_panel =
      static_cast<float*>(scratch(Scratch::kColumnPanels, columns.count() * strip_bytes + 1));
  // Several parts are summed up in float32.
  const bool rounds = f.m > most && f.dtype != FT_FLOAT32;
  const int32_t sums_dtype = rounds ? int32_t(FT_FLOAT32) : f.dtype;
  void* const sums = rounds ? scratch(Scratch::kSums, count * int64_t(sizeof(float))) : f.dvalues;
  // Beyond W nothing is computed.
  if (!f.m || f.n % f.rows || f.k % f.columns)
    memset(sums, 0, size_t(count * element_bytes(sums_dtype)));
  for (int64_t begin = 0; begin < f.m; begin += most) {
    const int64_t end = lesser(f.m, begin + most);
    // A few wide parts of each operand.
    const int64_t parts = 2 * threads;
    parallel_for(threads, 2 * parts, [&](int64_t task, int) {
      const EdgeStrips& e = task < parts ? rows : columns;
      const int64_t part = task % parts, strips = e.count();
      pack_edges(e, task < parts ? y : x, begin, end, per_item, part * strips / parts,
                 (part + 1) * strips / parts, task < parts ? row_panel : column_panel);
    });
    const EdgeProduct product{
        w,     rows, columns,    row_panel, column_panel, ceil_div(end - begin, per_item),
        pairs, sums, sums_dtype, begin > 0};
    parallel_for(threads, w.groups(), [&](int64_t task, int) { product.add_group(w.order[task]); });
  }
  if (rounds)
    f.dtype == FT_BFLOAT16
        ? round_sums<bf16>(static_cast<const float*>(sums), count, f.dvalues, threads)
        : round_sums<fp16>(static_cast<const float*>(sums), count, f.dvalues, threads);
}

}  // namespace
