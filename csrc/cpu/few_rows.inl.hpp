// Products of few rows, bound by how fast the columns come from memory: no register tile has work
// for what packing would cost, so columns that lie in order are read where they lie.
//
// An element of C is summed alike wherever its columns come from: over a block of depth, item p
// goes to sum p % kLanes, and these kLanes sums are added in pairs.
#include "cpu/pack.inl.hpp"

namespace {

constexpr int kFewRows = 4;
// Items of depth of a row that are put in order at once.
constexpr int64_t kMostRowItems = 12288;
// Strips that are multiplied together.
constexpr int kStripsTogether = 64;

// A packed strip, and how many floats lie between an item of it and what is read next.
struct PackedItems {
  const float* data;
  int64_t next;
};

// The kLanes sums of each lane: neighbours are added, then neighbouring pairs, and so on.
FT_INLINE Vec add_in_pairs(Vec* sums) {
#pragma GCC unroll 4
  for (int apart = 1; apart < kLanes; apart *= 2)
#pragma GCC unroll 8
    for (int j = 0; j < kLanes; j += 2 * apart) sums[j] = add(sums[j], sums[j + apart]);
  return sums[0];
}

// totals[i] = row i, whose items are neighbours, times a packed strip, over one block of depth.
// As many of the kLanes sums of each row at a time as there are registers.
template <bool kPairs, int kRows>
void rows_times_strip(const float* rows, int64_t row_stride, const PackedItems& columns,
                      int64_t items, Vec* totals) {
  constexpr int kPart = kLanes / kRows;
  Vec sums[kRows * kLanes];
  for (int part = 0; part < kLanes; part += kPart) {
    Vec sum[kRows][kPart];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
      for (int t = 0; t < kPart; ++t) sum[i][t] = zero();
    const auto add_item = [&](int t, int64_t p) __attribute__((always_inline)) {
      const Vec column = load(columns.data + p * kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i)
        sum[i][t] = multiply_add<kPairs>(splat(rows[i * row_stride + p]), column, sum[i][t]);
    };
    int64_t p = 0;
    for (; p + kLanes <= items; p += kLanes)
#pragma GCC unroll 16
      for (int t = 0; t < kPart; ++t) {
        __builtin_prefetch(columns.data + columns.next + (p + part + t) * kLanes, 0, 2);
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
  for (int i = 0; i < kRows; ++i) totals[i] = add_in_pairs(sums + i * kLanes);
}

inline void rows_times_packed(const float* rows, int64_t row_stride, int height,
                              const PackedItems& columns, int64_t items, bool pairs, Vec* totals) {
  auto multiply = height == 1   ? rows_times_strip<false, 1>
                  : height == 2 ? rows_times_strip<false, 2>
                                : rows_times_strip<false, kFewRows>;
#if FT_BF16_DOT
  if (pairs)
    multiply = height == 1   ? rows_times_strip<true, 1>
               : height == 2 ? rows_times_strip<true, 2>
                             : rows_times_strip<true, kFewRows>;
#else
  (void)pairs;
#endif
  multiply(rows, row_stride, columns, items, totals);
}

// Rows times strips of lines that are neighbours in memory, over one block of depth. An item of all
// strips is one run of memory, read from end to end before the next: a strip by itself would touch
// another page with every item. The sums wait in the cache; each is loaded and stored once for
// kRounds items.
template <class T, bool kPairs, int kRows>
void rows_times_neighbours(const float* rows, int64_t row_stride, const T* data,
                           int64_t depth_stride, int lines, int64_t values, Vec* totals) {
  constexpr int kPart = kLanes / kRows < 4 ? kLanes / kRows : 4, kRounds = 4;
  constexpr int kStrips = kStripsTogether / kRows;
  const int64_t items = kPairs ? (values + 1) / 2 : values;
  const int strips = (lines + kLanes - 1) / kLanes;
  Vec sums[kStrips][kRows][kLanes];
  for (int strip = 0; strip < strips; ++strip)
    for (int i = 0; i < kRows; ++i)
      for (int t = 0; t < kLanes; ++t) sums[strip][i][t] = zero();
  for (int64_t p = 0; p < items; p += kRounds * kLanes)
    for (int part = 0; part < kLanes; part += kPart)
      for (int strip = 0; strip < strips; ++strip) {
        const int n = int(lesser(kLanes, lines - strip * kLanes));
        const T* const from = data + strip * kLanes;
        Vec sum[kRows][kPart];
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
          for (int t = 0; t < kPart; ++t) sum[i][t] = sums[strip][i][part + t];
        const auto add_item = [&](int t, int64_t item) __attribute__((always_inline)) {
          const T* const at = from + (kPairs ? 2 : 1) * item * depth_stride;
          __builtin_prefetch(at + (kPairs ? 2 : 1) * kRounds * kLanes * depth_stride, 0, 2);
          Vec column = load(at, n);
#if FT_BF16_DOT
          if constexpr (kPairs) {
            __builtin_prefetch(at + (2 * kRounds * kLanes + 1) * depth_stride, 0, 2);
            column = zip_pairs(column, 2 * item + 1 < values ? load(at + depth_stride, n) : zero());
          }
#endif
#pragma GCC unroll 4
          for (int i = 0; i < kRows; ++i)
            sum[i][t] = multiply_add<kPairs>(splat(rows[i * row_stride + item]), column, sum[i][t]);
        };
        const int64_t end = lesser(items, p + kRounds * kLanes);
        int64_t q = p;
        for (; q + kLanes <= end; q += kLanes)
#pragma GCC unroll 4
          for (int t = 0; t < kPart; ++t) add_item(t, q + part + t);
#pragma GCC unroll 4
        for (int t = 0; t < kPart; ++t)
          if (q + part + t < end) add_item(t, q + part + t);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
          for (int t = 0; t < kPart; ++t) sums[strip][i][part + t] = sum[i][t];
      }
  for (int strip = 0; strip < strips; ++strip)
    for (int i = 0; i < kRows; ++i) *totals++ = add_in_pairs(sums[strip][i]);
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
    totals[i] = add_in_pairs(sums[i]);
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
  const auto multiply = height == 1   ? rows_times_neighbours<T, kPairs, 1>
                        : height == 2 ? rows_times_neighbours<T, kPairs, 2>
                                      : rows_times_neighbours<T, kPairs, kFewRows>;
  const int together = kStripsTogether / height * kLanes;
  const T* const data = static_cast<const T*>(a.data) + begin * a.depth_stride + line;
  for (int first = 0; first < lines; first += together, totals += kStripsTogether)
    multiply(rows, row_stride, data + first, a.depth_stride, int(lesser(together, lines - first)),
             end - begin, totals);
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
