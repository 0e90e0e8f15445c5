// Products of few rows, bound by how fast the columns come from memory: no register tile has work
// for what packing would cost, so columns that lie in order are read where they lie.
//
// An element of C is summed alike wherever its columns come from: over a block of depth, item p
// goes to sum p % kLanes, and these kLanes sums are added by halves.
#include "cpu/pack.inl.hpp"

namespace {

constexpr int kFewRows = 4;
// Items of depth of a row that are put in order at once.
constexpr int64_t kMostRowItems = 12288;
// Strips that are multiplied together, and how many ahead memory is asked for.
constexpr int kStripsTogether = 16, kStripsAhead = 8;

// Where the columns of a strip come from, item by item: packed, or lines that are neighbours.
struct PackedItems {
  const float* data;
  int64_t next;  // floats to what is read next

  FT_INLINE Vec load_item(int64_t p) const { return load(data + p * kLanes); }
  FT_INLINE void fetch(int64_t p) const { __builtin_prefetch(data + next + p * kLanes, 0, 2); }
};

template <class T, bool kPairs>
struct NeighbouringLines {
  const T* data;
  int64_t depth_stride, values;  // values of depth that there are
  int lines;

  FT_INLINE Vec load_item(int64_t p) const {
#if FT_BF16_DOT
    if constexpr (kPairs) {
      const T* from = data + 2 * p * depth_stride;
      return zip_pairs(load(from, lines),
                       2 * p + 1 < values ? load(from + depth_stride, lines) : zero());
    }
#endif
    return load(data + p * depth_stride, lines);
  }
  FT_INLINE void fetch(int64_t p) const {
    const T* next = data + kStripsAhead * kLanes + (kPairs ? 2 : 1) * p * depth_stride;
    __builtin_prefetch(next, 0, 2);
    if (kPairs) __builtin_prefetch(next + depth_stride, 0, 2);
  }
};

// The kLanes sums of each lane, added by halves.
FT_INLINE Vec add_by_halves(Vec* sums) {
#pragma GCC unroll 4
  for (int half = kLanes / 2; half; half /= 2)
#pragma GCC unroll 8
    for (int j = 0; j < half; ++j) sums[j] = add(sums[j], sums[j + half]);
  return sums[0];
}

// totals[i] = row i, whose items are neighbours, times a strip of columns, over one block of depth.
// As many of the kLanes sums of each row at a time as there are registers.
template <bool kPairs, int kRows, class Items>
void rows_times_strip(const float* rows, int64_t row_stride, const Items& columns, int64_t items,
                      Vec* totals) {
  constexpr int kPart = kLanes / kRows;
  Vec sums[kRows * kLanes];
  for (int part = 0; part < kLanes; part += kPart) {
    Vec sum[kRows][kPart];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
      for (int t = 0; t < kPart; ++t) sum[i][t] = zero();
    const auto add_item = [&](int t, int64_t p) __attribute__((always_inline)) {
      const Vec column = columns.load_item(p);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i)
        sum[i][t] = multiply_add<kPairs>(splat(rows[i * row_stride + p]), column, sum[i][t]);
    };
    int64_t p = 0;
    for (; p + kLanes <= items; p += kLanes)
#pragma GCC unroll 16
      for (int t = 0; t < kPart; ++t) {
        columns.fetch(p + part + t);
        add_item(t, p + part + t);
      }
#pragma GCC unroll 16
    for (int t = 0; t < kPart; ++t)
      if (p + part + t < items) add_item(t, p + part + t);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
      for (int t = 0; t < kPart; ++t) sums[i * kLanes + part + t] = sum[i][t];
  }
  for (int i = 0; i < kRows; ++i) totals[i] = add_by_halves(sums + i * kLanes);
}

template <bool kPairs, class Items>
void few_rows_times_strip(const float* rows, int64_t row_stride, int height, const Items& columns,
                          int64_t items, Vec* totals) {
  const auto multiply = height == 1   ? rows_times_strip<kPairs, 1, Items>
                        : height == 2 ? rows_times_strip<kPairs, 2, Items>
                                      : rows_times_strip<kPairs, kFewRows, Items>;
  multiply(rows, row_stride, columns, items, totals);
}

inline void rows_times_packed(const float* rows, int64_t row_stride, int height,
                              const PackedItems& columns, int64_t items, bool pairs, Vec* totals) {
#if FT_BF16_DOT
  if (pairs)
    few_rows_times_strip<true>(rows, row_stride, height, columns, items, totals);
  else
#else
  (void)pairs;
#endif
    few_rows_times_strip<false>(rows, row_stride, height, columns, items, totals);
}

// Rows times kLanes lines that are contiguous in depth, over one block of `items` with `values`:
// a vector holds the kLanes sums of one element. Beyond the last line it is the last again.
template <class T, bool kPairs, int kRows>
void rows_times_lines(const float* rows, int64_t row_stride, const T* data, int64_t line_stride,
                      int lines, int64_t values, Vec* totals) {
  constexpr int kPerItem = kPairs ? 2 : 1, kStep = kLanes * kPerItem;
  constexpr int kTogether = kLanes == 16 || kRows < 4 ? 4 : 2;  // as the registers allow
  Vec sums[kRows][kLanes];
  for (int first = 0; first < kLanes; first += kTogether) {
    const T* from[kTogether];
    for (int j = 0; j < kTogether; ++j) from[j] = data + lesser(first + j, lines - 1) * line_stride;
    Vec sum[kRows][kTogether];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kTogether; ++j) sum[i][j] = zero();
    const auto step = [&](int64_t p, int n) __attribute__((always_inline)) {
      Vec row[kRows];
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i)
        row[i] = load(rows + i * row_stride + p / kPerItem, (n + kPerItem - 1) / kPerItem);
#pragma GCC unroll 4
      for (int j = 0; j < kTogether; ++j) {
        __builtin_prefetch(from[j] + p + kTogether * line_stride, 0, 2);
        const Vec column = load_items<kPairs>(from[j] + p, n);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) sum[i][j] = multiply_add<kPairs>(row[i], column, sum[i][j]);
      }
    };
    int64_t p = 0;
    for (; p + kStep <= values; p += kStep) step(p, kStep);
    if (p < values) step(p, int(values - p));
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kTogether; ++j) sums[i][first + j] = sum[i][j];
  }
  for (int i = 0; i < kRows; ++i) {
    transpose(sums[i]);
    totals[i] = add_by_halves(sums[i]);
  }
}

template <class T, bool kPairs>
void multiply_lines(const Operand& a, const float* rows, int64_t row_stride, int height,
                    int64_t line, int lines, int64_t begin, int64_t end, Vec* totals) {
  const auto multiply = height == 1   ? rows_times_lines<T, kPairs, 1>
                        : height == 2 ? rows_times_lines<T, kPairs, 2>
                                      : rows_times_lines<T, kPairs, kFewRows>;
  const T* data = static_cast<const T*>(a.data) + line * a.line_stride + begin;
  for (int first = 0; first < lines; first += kLanes, totals += height)
    multiply(rows, row_stride, data + first * a.line_stride, a.line_stride, lines - first,
             end - begin, totals);
}

template <class T, bool kPairs>
void multiply_across(const Operand& a, const float* rows, int64_t row_stride, int height,
                     int64_t line, int lines, int64_t begin, int64_t end, Vec* totals) {
  const T* const data = static_cast<const T*>(a.data) + begin * a.depth_stride + line;
  const int64_t items = kPairs ? (end - begin + 1) / 2 : end - begin;
  for (int first = 0; first < lines; first += kLanes, totals += height)
    few_rows_times_strip<kPairs>(
        rows, row_stride, height,
        NeighbouringLines<T, kPairs>{data + first, a.depth_stride, end - begin,
                                     int(lesser(kLanes, lines - first))},
        items, totals);
}

template <class T, bool kPairs>
auto in_place(const Operand& a) -> decltype(a.multiply) {
  if (a.mask) return nullptr;
  if (a.depth_stride == 1) return multiply_lines<T, kPairs>;
  return a.line_stride == 1 ? multiply_across<T, kPairs> : nullptr;
}

// How few rows are multiplied with these columns where they lie, or null.
inline auto choose_in_place(const Operand& a, int32_t dtype, bool pairs) -> decltype(a.multiply) {
  if (dtype == FT_FLOAT32) return in_place<float, false>(a);
  if (dtype == FT_FLOAT16) return in_place<fp16, false>(a);
  return pairs ? in_place<bf16, FT_BF16_DOT>(a) : in_place<bf16, false>(a);
}

}  // namespace
