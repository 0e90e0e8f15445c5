// y and dX of up to kFewRows tokens, bound by how fast the blocks come from memory: no packing,
// each block is read where it lies, from end to end, into sums that wait in the first-level cache.
namespace {

// sums[line][kLanes] of kRows tokens += a block whose lines are contiguous in depth.
template <class T, bool kPairs, int kRows>
void add_lines(const float* rows, int64_t row_stride, const T* block, int64_t line_stride,
               int64_t lines, int64_t values, Vec* sums) {
  constexpr int kPerItem = kPairs ? 2 : 1, kStep = kLanes * kPerItem;
  constexpr int kTogether = kLanes / kRows;
  for (int64_t first = 0; first < lines; first += kTogether) {
    const T* from[kTogether];
#pragma GCC unroll 16
    for (int j = 0; j < kTogether; ++j)
      from[j] = block + lesser(first + j, lines - 1) * line_stride;
    Vec* const at = sums + first * kRows;
    Vec sum[kTogether][kRows];
#pragma GCC unroll 16
    for (int j = 0; j < kTogether; ++j)
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) sum[j][i] = at[j * kRows + i];
    const auto step = [&](int64_t p, int n) __attribute__((always_inline)) {
      Vec row[kRows];
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i)
        row[i] = load(rows + i * row_stride + p / kPerItem, (n + kPerItem - 1) / kPerItem);
#pragma GCC unroll 16
      for (int j = 0; j < kTogether; ++j) {
        const Vec column = load_items<kPairs>(from[j] + p, n);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) sum[j][i] = multiply_add<kPairs>(row[i], column, sum[j][i]);
      }
    };
    int64_t p = 0;
    for (; p + kStep <= values; p += kStep) step(p, kStep);
    if (p < values) step(p, int(values - p));
#pragma GCC unroll 16
    for (int j = 0; j < kTogether; ++j)
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) at[j * kRows + i] = sum[j][i];
  }
}

// Two strips of a block whose lines are neighbours, so many lanes of each, as items: of two rows of
// bf16 the values of each line next to each other.
template <class T, bool kPairs>
FT_INLINE void load_across(const T* p, int64_t stride, bool second, const int* lanes, Vec* strips) {
#if FT_BF16_DOT
  if constexpr (kPairs) {
    const int n = lanes[0] + lanes[1];
    const __m512i a = _mm512_castps_si512(load_pairs(p, n));
    const __m512i b = _mm512_castps_si512(second ? load_pairs(p + stride, n) : zero());
    // Value i of a, then of b, for the lanes of the first strip.
    const __m512i first = _mm512_or_si512(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        _mm512_slli_epi32(
            _mm512_setr_epi32(32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47), 16));
    const __m512i next = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    strips[0] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, first, b));
    strips[1] = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, next, b));
    return;
  }
#endif
  (void)stride;
  (void)second;
  strips[0] = load(p, lanes[0]);
  strips[1] = load(p + kLanes, lanes[1]);
}

// sums[strip][row] += a block whose depth has a stride and whose lines are neighbours.
template <class T, bool kPairs, int kRows>
void add_across(const float* rows, int64_t row_stride, const T* block, int64_t depth_stride,
                int64_t lines, int64_t values, Vec* sums) {
  constexpr int kPerItem = kPairs ? 2 : 1, kTogether = kRows == kFewRows ? 2 : 4;
  for (int64_t first = 0; first < lines; first += kTogether * kLanes) {
    Vec* const at = sums + first / kLanes * kRows;
    Vec sum[kTogether][kRows];
    int lanes[kTogether];
#pragma GCC unroll 4
    for (int j = 0; j < kTogether; ++j) {
      lanes[j] = int(greater(0, lesser(kLanes, lines - first - j * kLanes)));
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) sum[j][i] = at[j * kRows + i];
    }
    const T* from = block + first;
    for (int64_t p = 0; p < values; p += kPerItem, from += kPerItem * depth_stride) {
      Vec row[kRows], column[kTogether];
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) row[i] = splat(rows[i * row_stride + p / kPerItem]);
#pragma GCC unroll 2
      for (int j = 0; j < kTogether; j += 2)
        load_across<T, kPairs>(from + j * kLanes, depth_stride, p + 1 < values, lanes + j,
                               column + j);
#pragma GCC unroll 4
      for (int j = 0; j < kTogether; ++j)
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i)
          sum[j][i] = multiply_add<kPairs>(row[i], column[j], sum[j][i]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < kTogether; ++j)
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) at[j * kRows + i] = sum[j][i];
  }
}

// The lines of the longest block, up to whole tiles of either kernel.
inline int64_t padded_lines(const BlockSide& w) {
  return ceil_div(w.line_edge, 4 * kLanes) * 4 * kLanes;
}

// One row of the grid, for kRows tokens whose items lie in order.
template <class T, bool kPairs, int kRows>
void multiply_group_few(const BlockSide& w, const float* rows, int64_t row_stride, int m,
                        int64_t group, Vec* sums, float* tile, const Result& c) {
  const int64_t lines = w.lines_of(group), padded = padded_lines(w);
  const bool contiguous = w.depth_stride == 1;
  const int64_t vectors = contiguous ? padded * kRows : padded / kLanes * kRows;
  for (int64_t i = 0; i < vectors; ++i) sums[i] = zero();
  for (int64_t entry = w.offsets[group]; entry < w.offsets[group + 1]; ++entry) {
    const float* const from = rows + w.places[entry] * w.items();
    const T* const block = static_cast<const T*>(w.data(entry));
    if (contiguous)
      add_lines<T, kPairs, kRows>(from, row_stride, block, w.line_stride, lines, w.values_of(entry),
                                  sums);
    else
      add_across<T, kPairs, kRows>(from, row_stride, block, w.depth_stride, lines,
                                   w.values_of(entry), sums);
  }
  if (contiguous) {
    // The lanes of kLanes sums at a time are added up.
    for (int64_t line = 0; line < lines; line += kLanes / kRows) {
      Vec* const square = sums + line * kRows;
      transpose(square);
      float totals[kLanes];
      store(totals, add_in_pairs(square));
      for (int j = 0; j < kLanes / kRows; ++j)
        for (int i = 0; i < kRows; ++i) tile[i * padded + line + j] = totals[j * kRows + i];
    }
  } else {
    for (int64_t strip = 0; strip * kLanes < lines; ++strip)
      for (int i = 0; i < kRows; ++i)
        store(tile + i * padded + strip * kLanes, sums[strip * kRows + i]);
  }
  c.store(c, tile, padded, 0, w.line(group), m, int(lines));
}

// The tokens' items one after another; those that complete a pair, and tokens, are zeros.
template <class T, bool kPairs>
void put_in_order(const Operand& x, int m, int tokens, int64_t depth, int64_t row_stride,
                  float* rows) {
  const T* const data = static_cast<const T*>(x.data);
  const int64_t padded = kPairs ? ceil_div(depth, 2) * 2 : depth;
  for (int i = 0; i < tokens; ++i, rows += row_stride)
    for (int64_t p = 0; p < padded; ++p) {
      const T value = i < m && p < depth ? data[i * x.line_stride + p * x.depth_stride] : T{};
      if constexpr (kPairs)
        memcpy(reinterpret_cast<char*>(rows) + p * sizeof(T), &value, sizeof(T));
      else
        rows[p] = to_float(value);
    }
}

template <class T, bool kPairs, int kRows>
void multiply_few_rows(const BlockSide& w, const Operand& x, int m, const Result& c, int threads) {
  const int64_t items = ceil_div(w.depth, w.per_item()), padded = padded_lines(w);
  float* const rows =
      static_cast<float*>(scratch(Scratch::kOrdered, (kRows * items + 1) * int64_t(sizeof(float))));
  put_in_order<T, kPairs>(x, m, kRows, w.depth, items, rows);
  const int64_t own = padded * kRows * (kLanes + 1);
  float* const workers =
      static_cast<float*>(scratch(Scratch::kWorkers, threads * own * int64_t(sizeof(float))));
  // Each task reads one stretch of the blocks.
  const int64_t groups = w.groups(), tasks = lesser(groups, 16 * threads);
  parallel_for(threads, tasks, [&](int64_t task, int worker) {
    float* const tile = workers + worker * own + padded * kRows * kLanes;
    for (int64_t g = task * groups / tasks; g < (task + 1) * groups / tasks; ++g)
      multiply_group_few<T, kPairs, kRows>(w, rows, items, m, g,
                                           reinterpret_cast<Vec*>(workers + worker * own), tile, c);
  });
}

template <class T, bool kPairs>
void multiply_few(const BlockSide& w, const Operand& x, int m, const Result& c, int threads) {
  const auto multiply = m == 1   ? multiply_few_rows<T, kPairs, 1>
                        : m == 2 ? multiply_few_rows<T, kPairs, 2>
                                 : multiply_few_rows<T, kPairs, kFewRows>;
  multiply(w, x, m, c, threads);
}

}  // namespace
