// Products of few rows, bound by how fast the columns come from memory: every value is read once,
// in place and in the order in which it lies, instead of being packed.
//
// Everything is widened to float32. An element of C is summed in runs of depth, each from zero:
// where depth is contiguous as one sum per lane, else, since that is one chain, in shorter runs of
// partial sums of kItemsTogether items.
namespace {

constexpr int kStreamedRows = 4;
constexpr int kRunDepth = 1024, kShortRunDepth = 64;
constexpr int kItemsTogether = 8;

// Lines that are contiguous in depth: dot products of vectors, several lines at a time.
template <class T, int kRows>
void add_dots(const T* data, int64_t line_stride, int lines, const float* rows, int depth,
              float* tile) {
  constexpr int kTogether = kLanes == 16 || kRows < 4 ? 4 : 2;
  for (int line = 0; line < lines; line += kLanes) {
    Vec sums[kRows][kLanes];
    for (int first = 0; first < kLanes; first += kTogether) {
      const T* from[kTogether];  // beyond the last line it is the last again, and not stored
      for (int j = 0; j < kTogether; ++j)
        from[j] = data + lesser(line + first + j, lines - 1) * line_stride;
      Vec sum[kRows][kTogether];
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kTogether; ++j) sum[i][j] = zero();
      for (int p = 0; p < depth; p += kLanes) {
        const int n = int(lesser(kLanes, depth - p));
        Vec row[kRows];
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) row[i] = load(rows + i * kRunDepth + p, n);
#pragma GCC unroll 4
        for (int j = 0; j < kTogether; ++j) {
          __builtin_prefetch(from[j] + p + kTogether * line_stride);
          const Vec column = load(from[j] + p, n);
#pragma GCC unroll 4
          for (int i = 0; i < kRows; ++i) sum[i][j] = fma(row[i], column, sum[i][j]);
        }
      }
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kTogether; ++j) sums[i][first + j] = sum[i][j];
    }
    for (int i = 0; i < kRows; ++i) {
      transpose(sums[i]);
#pragma GCC unroll 4
      for (int half = kLanes / 2; half; half /= 2)
        for (int j = 0; j < half; ++j) sums[i][j] = add(sums[i][j], sums[i][j + half]);
      float* to = tile + i * kBlockColumns + line;
      store(to, add(load(to), sums[i][0]));
    }
  }
}

// Lines that are neighbours in memory: multiples of vectors of them, several items of depth at a
// time.
template <class T, int kRows>
void add_multiples(const T* data, int64_t depth_stride, int lines, const float* rows, int depth,
                   float* tile) {
  float sums[kRows][kBlockColumns] = {};
  const auto add_items = [&](int p, int count) __attribute__((always_inline)) {
    for (int line = 0; line < lines; line += kLanes) {
      const int n = int(lesser(kLanes, lines - line));
      Vec sum[kRows];
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) sum[i] = zero();
#pragma GCC unroll 8
      for (int q = 0; q < count; ++q) {
        const T* from = data + (p + q) * depth_stride + line;
        __builtin_prefetch(from + kItemsTogether * depth_stride);
        const Vec column = load(from, n);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i)
          sum[i] = fma(splat(rows[i * kRunDepth + p + q]), column, sum[i]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) store(sums[i] + line, add(load(sums[i] + line), sum[i]));
    }
  };
  int p = 0;
  for (; p + kItemsTogether <= depth; p += kItemsTogether) add_items(p, kItemsTogether);
  for (; p < depth; ++p) add_items(p, 1);
  for (int i = 0; i < kRows; ++i)
    for (int line = 0; line < lines; line += kLanes) {
      float* to = tile + i * kBlockColumns + line;
      store(to, add(load(to), load(sums[i] + line)));
    }
}

// Row i of a packed strip, `depth` values from `begin` on, as floats.
template <bool kPairs>
void unpack_row(const float* strip, int i, int64_t begin, int depth, float* row) {
  for (int p = 0; p < depth; ++p) {
    const int64_t item = kPairs ? (begin + p) / 2 : begin + p;
    row[p] = strip[item * kLanes + i];
    if (kPairs) row[p] = to_float(bf16{uint16_t(float_bits(row[p]) >> (p % 2 * 16))});
  }
}

template <class T, bool kPairs, int kRows>
void stream_rows(const Operand& columns, const float* strip, int64_t line, int lines, int64_t depth,
                 float* tile) {
  float rows[kRows * kRunDepth];
  const int longest = columns.depth_stride == 1 ? kRunDepth : kShortRunDepth;
  for (int64_t p = 0; p < depth; p += longest) {
    const int run = int(lesser(longest, depth - p));
    const T* data =
        static_cast<const T*>(columns.data) + line * columns.line_stride + p * columns.depth_stride;
    for (int i = 0; i < kRows; ++i) unpack_row<kPairs>(strip, i, p, run, rows + i * kRunDepth);
    if (columns.depth_stride == 1)
      add_dots<T, kRows>(data, columns.line_stride, lines, rows, run, tile);
    else
      add_multiples<T, kRows>(data, columns.depth_stride, lines, rows, run, tile);
  }
}

template <class T, bool kPairs>
void stream(const Operand& columns, const float* strip, int rows, int64_t line, int lines,
            int64_t depth, float* tile) {
  const auto stream_height = rows == 1   ? stream_rows<T, kPairs, 1>
                             : rows == 2 ? stream_rows<T, kPairs, 2>
                                         : stream_rows<T, kPairs, kStreamedRows>;
  stream_height(columns, strip, line, lines, depth, tile);
}

// What streams these columns, or null where they lie in no order or are masked.
inline decltype(Operand::stream) choose_stream(const Operand& columns, int32_t dtype, bool pairs) {
  if (columns.mask || (columns.depth_stride != 1 && columns.line_stride != 1)) return nullptr;
  if (dtype == FT_FLOAT32) return stream<float, false>;
  if (dtype == FT_FLOAT16) return stream<fp16, false>;
  return pairs ? stream<bf16, true> : stream<bf16, false>;
}

}  // namespace
