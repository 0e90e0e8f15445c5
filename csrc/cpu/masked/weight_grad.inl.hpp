// dW = dY^T X at the trained entries only, for one level of the instruction set; dW is never
// written. By what is trained:
//   rows      one product of the GEMM core, its rows gathered from dY as they are packed
//   columns   the same from X; C is (columns, N), which is the order of the values
//   blocks    one product for every few blocks that share rows
//   elements  few: dot products over chunks of tokens, transposed once each so that a column's
//             tokens are neighbours; many: the core's products over chunks of tokens, of whose
//             tiles only the trained elements are kept
// Accumulated in float32; an entry is summed in one order whatever the number of threads.
#include "cpu/vec.inl.hpp"
// After the vocabulary:
#include "cpu/dropout.inl.hpp"
#include "cpu/gemm.inl.hpp"

namespace {

// ---- an operand made of runs of lines ------------------------------------------------------

// Lines of `dense`, of which run i begins at the line of rectangle first + i.
struct ListedLines {
  Operand dense;
  int32_t dtype;
  Rectangles at;
  bool rows;    // a line is a row of W, else a column
  int64_t run;  // lines of a rectangle
  int64_t first;

  int64_t line(int64_t i) const {
    const int64_t start = at.start(first + i / run);
    return (rows ? start / at.stride : start % at.stride) + i % run;
  }
};

template <class T, bool kPairs>
void pack_listed(const Operand& a, int64_t line, int lines, int64_t begin, int64_t end,
                 float* strip) {
  const ListedLines& list = *static_cast<const ListedLines*>(a.data);
  if (line / list.run == (line + lines - 1) / list.run)
    return list.dense.pack(list.dense, list.line(line), lines, begin, end, strip);
  constexpr int kPerItem = kPairs ? 2 : 1, kRun = 4 * kLanes * kPerItem;
  const T* from[kLanes];
  for (int i = 0; i < lines; ++i)
    from[i] = static_cast<const T*>(list.dense.data) + list.line(line + i) * list.dense.line_stride;
  T gathered[kLanes * kRun];
  for (int64_t p = begin; p < end; p += kRun) {
    const int n = int(lesser(kRun, end - p));
    for (int q = 0; q < n; ++q)
      for (int i = 0; i < lines; ++i)
        gathered[i * kRun + q] = from[i][(p + q) * list.dense.depth_stride];
    pack_lines<T, kPairs, false>(dense(gathered, kRun, 1), 0, lines, 0, n, strip);
    strip += (n + kPerItem - 1) / kPerItem * kLanes;
  }
}

// `list` must outlive the operand.
inline Operand listed(ListedLines& list) {
  const bool pairs = FT_BF16_DOT && list.dtype == FT_BFLOAT16;
  choose_packer(list.dense, list.dtype, pairs);
  Operand a = dense(&list, 0, 0);
  a.short_runs = true;
  if (list.dtype == FT_FLOAT32)
    a.pack = pack_listed<float, false>;
  else if (list.dtype == FT_FLOAT16)
    a.pack = pack_listed<fp16, false>;
  else
    a.pack = pairs ? pack_listed<bf16, FT_BF16_DOT> : pack_listed<bf16, false>;
  return a;
}

// dY^T and X: lines are W's rows and columns, depth is tokens [begin, ...).
inline Operand rows_of(const MaskedWeightGrad& f, int64_t begin = 0) {
  return dense(advanced(f.grad, f.dtype, begin * f.grad_stride_m), f.grad_stride_n,
               f.grad_stride_m);
}
inline Operand columns_of(const MaskedWeightGrad& f, int64_t begin = 0) {
  return dense(advanced(f.x, f.dtype, begin * f.x_stride_m), f.x_stride_k, f.x_stride_m);
}

// ---- rows, columns, blocks -----------------------------------------------------------------

inline void grad_of_rows(const MaskedWeightGrad& f) {
  ListedLines list{rows_of(f), f.dtype, f.at, true, f.at.rows, 0};
  const Product q = product(listed(list), f.dtype, columns_of(f), f.dtype, f.m);
  gemm(f.at.count * f.at.rows, f.k, &q, 1, result(f.values, FT_FLOAT32, f.k, 1), f.threads);
}

inline void grad_of_columns(const MaskedWeightGrad& f) {
  ListedLines list{columns_of(f), f.dtype, f.at, false, 1, 0};
  const Product q = product(listed(list), f.dtype, rows_of(f), f.dtype, f.m);
  gemm(f.at.count, f.n, &q, 1, result(f.values, FT_FLOAT32, f.n, 1), f.threads);
}

// Columns that one task of blocks computes, and rows.
constexpr int64_t kTaskColumns = 256, kTaskRows = kBlockRows;

// Where the tiles of some blocks go: block by block.
struct BlockValues {
  float* values;  // of the first of these blocks
  int64_t area, columns, first_row;
};

inline void store_blocks(const Result& c, const float* tile, int64_t pitch, int64_t i, int64_t j,
                         int rows, int columns) {
  const BlockValues& b = *static_cast<const BlockValues*>(c.data);
  for (int row = 0; row < rows; ++row, tile += pitch)
    for (int64_t column = 0; column < columns;) {
      const int64_t block = (j + column) / b.columns, within = (j + column) % b.columns;
      const int64_t run = lesser(b.columns - within, columns - column);
      memcpy(b.values + block * b.area + (b.first_row + i + row) * b.columns + within,
             tile + column, size_t(run) * sizeof(float));
      column += run;
    }
}

// The blocks from `first` on that lie in the same rows of W, at most so many.
inline int64_t neighbours(const Rectangles& at, int64_t first, int64_t most) {
  const int64_t end = lesser(at.count, first + most), row = at.start(first) / at.stride;
  int64_t next = first + 1;
  while (next < end && at.start(next) / at.stride == row) ++next;
  return next - first;
}

inline void grad_of_blocks(const MaskedWeightGrad& f) {
  const int64_t together = greater(1, kTaskColumns / f.at.columns);
  const int64_t parts = ceil_div(f.at.rows, kTaskRows);
  // The tasks' first blocks; their number is found on the way.
  int64_t* const starts =
      static_cast<int64_t*>(scratch(Scratch::kMask, (f.at.count + 1) * int64_t(sizeof(int64_t))));
  int64_t groups = 0;
  for (int64_t first = 0; first < f.at.count; first += neighbours(f.at, first, together))
    starts[groups++] = first;
  starts[groups] = f.at.count;
  parallel_for(f.threads, groups * parts, [&](int64_t task, int) {
    const int64_t first = starts[task / parts], count = starts[task / parts + 1] - first;
    const int64_t row = task % parts * kTaskRows;
    ListedLines list{columns_of(f), f.dtype, f.at, false, f.at.columns, first};
    Operand rows = rows_of(f);
    rows.data =
        advanced(rows.data, f.dtype, (f.at.start(first) / f.at.stride + row) * rows.line_stride);
    const Product q = product(rows, f.dtype, listed(list), f.dtype, f.m);
    BlockValues to{f.values + first * f.at.area(), f.at.area(), f.at.columns, row};
    gemm(lesser(kTaskRows, f.at.rows - row), count * f.at.columns, &q, 1,
         {&to, 0, 0, store_blocks, nullptr, false}, 1);
  });
}

// ---- elements ------------------------------------------------------------------------------

// Tokens of a chunk; a chunk is what the core sums from zero, or a power of two of vectors.
constexpr int64_t kSlabTokens = kDepthItems, kDotTokens = 256;
// Elements of which one task's rows hold about so many.
constexpr int64_t kDotTask = 256;

// begins[row]: the first element at or beyond the row; n + 1 of them.
inline void find_rows(const Rectangles& at, int64_t n, int64_t* begins) {
  int64_t row = 0;
  for (int64_t i = 0; i < at.count; ++i) {
    const int64_t own = at.start(i) / at.stride;
    while (row <= own) begins[row++] = i;
  }
  while (row <= n) begins[row++] = at.count;
}

struct ElementValues {
  float* values;
  const Rectangles& at;
  const int64_t* begins;
  bool accumulate;
};

// Of a tile, the trained elements.
template <class Index>
void store_elements(const Result& c, const float* tile, int64_t pitch, int64_t i, int64_t j,
                    int rows, int columns) {
  const ElementValues& e = *static_cast<const ElementValues*>(c.data);
  const Index* const index = static_cast<const Index*>(e.at.index);
  for (int row = 0; row < rows; ++row, tile += pitch) {
    const int64_t offset = (i + row) * e.at.stride + j;
    int64_t at = e.begins[i + row], high = e.begins[i + row + 1];
    const int64_t end = high;
    while (at < high) {
      const int64_t middle = (at + high) / 2;
      if (index[middle] < offset)
        at = middle + 1;
      else
        high = middle;
    }
    for (; at < end && index[at] - offset < columns; ++at) {
      const float sum = tile[index[at] - offset];
      e.values[at] = e.accumulate ? e.values[at] + sum : sum;
    }
  }
}

inline void grad_of_many_elements(const MaskedWeightGrad& f, const int64_t* begins) {
  ElementValues to{f.values, f.at, begins, false};
  const auto store = f.at.index_bytes == 4 ? store_elements<int32_t> : store_elements<int64_t>;
  for (int64_t begin = 0; begin < f.m; begin += kSlabTokens) {
    to.accumulate = begin > 0;
    const Product q = product(rows_of(f, begin), f.dtype, columns_of(f, begin), f.dtype,
                              lesser(kSlabTokens, f.m - begin));
    gemm(f.n, f.k, &q, 1, {&to, 0, 0, store, nullptr, false}, f.threads);
  }
}

// Lines [first, first + kLanes) of `count`, tokens [0, tokens): to[line][token], the tokens beyond
// up to a whole vector zero.
template <class T>
void transpose_tokens(const Operand& a, int64_t first, int64_t count, int64_t tokens, float* to) {
  const T* const data = static_cast<const T*>(a.data);
  const int lines = int(lesser(kLanes, count - first));
  for (int64_t token = 0; token < tokens; token += kLanes) {
    Vec rows[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      rows[i] = zero();
      if (token + i >= tokens) continue;
      const T* from = data + (token + i) * a.depth_stride + first * a.line_stride;
      if (a.line_stride == 1) {
        rows[i] = load(from, lines);
      } else {
        T values[kLanes];
        for (int line = 0; line < lines; ++line) values[line] = from[line * a.line_stride];
        rows[i] = load(values, lines);
      }
    }
    transpose(rows);
    for (int line = 0; line < lines; ++line) store(to + line * kDotTokens + token, rows[line]);
  }
}

// sums[j] = y * x_j over vectors of tokens, lane by lane.
template <int kCount>
FT_INLINE void dot(const float* y, const float* const* x, int64_t tokens, Vec* sums) {
  Vec sum[kCount];
#pragma GCC unroll 4
  for (int j = 0; j < kCount; ++j) sum[j] = zero();
  for (int64_t token = 0; token < tokens; token += kLanes) {
    const Vec own = load(y + token);
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) sum[j] = fma(own, load(x[j] + token), sum[j]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < kCount; ++j) sums[j] = sum[j];
}

// values[i] (+)= the sum over the lanes of sums[i], for n <= kLanes of them.
FT_INLINE void add_lanes(Vec* sums, int n, float* values, bool accumulate) {
  for (int i = n; i < kLanes; ++i) sums[i] = zero();
  transpose(sums);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] = add(sums[i], sums[i + half]);
  store(values, accumulate ? add(load(values, n), sums[0]) : sums[0], n);
}

// The elements of rows [begin, end) of a chunk of tokens.
template <class Index>
void dot_rows(const MaskedWeightGrad& f, const int64_t* begins, const float* y, const float* x,
              int64_t begin, int64_t end, int64_t tokens, bool accumulate) {
  constexpr int kTogether = 4;
  const Index* const index = static_cast<const Index*>(f.at.index);
  Vec sums[kLanes];
  int waiting = 0;
  for (int64_t row = begin; row < end; ++row) {
    const float* const own = y + row * kDotTokens;
    for (int64_t at = begins[row]; at < begins[row + 1];) {
      const int count = int(lesser(lesser(kTogether, kLanes - waiting), begins[row + 1] - at));
      const float* columns[kTogether];
      for (int j = 0; j < count; ++j)
        columns[j] = x + (int64_t(index[at + j]) - row * f.k) * kDotTokens;
      if (count == kTogether)
        dot<kTogether>(own, columns, tokens, sums + waiting);
      else
        for (int j = 0; j < count; ++j) dot<1>(own, columns + j, tokens, sums + waiting + j);
      at += count;
      waiting += count;
      if (waiting < kLanes) continue;
      add_lanes(sums, waiting, f.values + at - waiting, accumulate);
      waiting = 0;
    }
  }
  if (waiting) add_lanes(sums, waiting, f.values + begins[end] - waiting, accumulate);
}

inline void grad_of_few_elements(const MaskedWeightGrad& f, const int64_t* begins) {
  float* const y = static_cast<float*>(
      scratch(Scratch::kRowPanels, (f.n * kDotTokens + 1) * int64_t(sizeof(float))));
  float* const x = static_cast<float*>(
      scratch(Scratch::kColumnPanels, (f.k * kDotTokens + 1) * int64_t(sizeof(float))));
  const auto turn = f.dtype == FT_FLOAT32    ? transpose_tokens<float>
                    : f.dtype == FT_BFLOAT16 ? transpose_tokens<bf16>
                                             : transpose_tokens<fp16>;
  const auto dots = f.at.index_bytes == 4 ? dot_rows<int32_t> : dot_rows<int64_t>;
  const int64_t row_groups = ceil_div(f.n, kLanes), groups = row_groups + ceil_div(f.k, kLanes);
  const int64_t rows =
      greater(1, lesser(ceil_div(f.n, 4 * f.threads), f.n * kDotTask / greater(1, f.at.count)));
  for (int64_t begin = 0; begin < f.m; begin += kDotTokens) {
    const int64_t tokens = lesser(kDotTokens, f.m - begin);
    const Operand from_y = rows_of(f, begin), from_x = columns_of(f, begin);
    parallel_for(f.threads, groups, [&](int64_t group, int) {
      const int64_t line = (group < row_groups ? group : group - row_groups) * kLanes;
      if (group >= row_groups)
        turn(from_x, line, f.k, tokens, x + line * kDotTokens);
      else if (begins[line] < begins[lesser(f.n, line + kLanes)])
        turn(from_y, line, f.n, tokens, y + line * kDotTokens);
    });
    parallel_for(f.threads, ceil_div(f.n, rows), [&](int64_t task, int) {
      dots(f, begins, y, x, task * rows, lesser(f.n, (task + 1) * rows), tokens, begin > 0);
    });
  }
}

// Up to which density dot products win over whole tiles, as measured (ops/masked.md).
inline double few_density(int32_t dtype) {
  return FT_BF16_DOT && dtype == FT_BFLOAT16 ? 0.1 : 0.25;
}

inline void grad_of_elements(const MaskedWeightGrad& f) {
  int64_t* const begins =
      static_cast<int64_t*>(scratch(Scratch::kMask, (f.n + 1) * int64_t(sizeof(int64_t))));
  find_rows(f.at, f.n, begins);
  const bool few = double(f.at.count) < few_density(f.dtype) * double(f.n) * double(f.k);
  few ? grad_of_few_elements(f, begins) : grad_of_many_elements(f, begins);
}

inline void weight_grad(const MaskedWeightGrad& f) {
  if (!f.at.values()) return;
  const ScratchScope scope;
  MaskedWeightGrad own = f;
  if (double(f.at.values()) * double(f.m) < double(kSerialWork)) own.threads = 1;
  if (!f.m)
    for (int64_t i = 0; i < f.at.values(); ++i) f.values[i] = 0.0f;
  else if (f.at.columns == f.k)
    grad_of_rows(own);
  else if (f.at.columns == 1 && f.at.rows == f.n)
    grad_of_columns(own);
  else if (f.at.area() == 1)
    grad_of_elements(own);
  else
    grad_of_blocks(own);
}

constexpr MaskedWeightGradKernels kMaskedWeightGrad{weight_grad};

}  // namespace
