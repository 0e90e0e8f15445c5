// Operands of the GEMM core, and the producers that pack them.
//
// An operand is a list of lines (rows of C on the left, columns of C on the right), cut into strips
// and packed by its producer, Operand::pack, as [depth item][kLanes lines] of 32-bit items: an item
// is a float, or two bf16 values next to each other in depth. A producer may read dense memory at
// any strides, or make the values up (from codes, blocks, a mask).
namespace {

struct Operand {
  const void* data;
  int64_t line_stride, depth_stride;  // in elements
  int value_bytes;
  // Packs lines [line, line + lines), lines <= kLanes, depth [begin, end), into `strip`; missing
  // lines and the missing half of a last pair are zeros. `begin` is even.
  void (*pack)(const Operand&, int64_t line, int lines, int64_t begin, int64_t end, float* strip);
  // totals[strip][i] = row i of `rows` times the strip's lines, read where they lie, over depth
  // [begin, end) of one block; null: the lines must be packed. See few_rows.inl.hpp.
  void (*multiply)(const Operand&, const float* rows, int64_t row_stride, int height, int64_t line,
                   int lines, int64_t begin, int64_t end, Vec* totals);
  bool short_runs;  // lines are neighbours in memory: many of them are packed a few items at a time
  const uint8_t* mask;  // of dropout, or null: an element's index is that of these strides
  int64_t mask_line_stride, mask_depth_stride;
  // Packed before, over its whole depth and all lines (see Panel), or null; `pack` is not called.
  const float* panel;
  int64_t panel_strips;
  // Packed by every tile that uses it, however many do: it costs little, and would take much room.
  bool used_once;
  // Of kFewRows lines, some of which may be there for no row of C: their items lie in order, and
  // are not packed either.
  bool in_order;
};

// Columns of a tile of C, whose rows are so many floats apart.
constexpr int kBlockColumns = 256;
// How far ahead packing asks for memory: the hardware does not foresee so many streams at once.
constexpr int64_t kPrefetchBytes = 512;
// Items of depth that a strip is packed by where its neighbours share its rows of memory.
constexpr int64_t kShortRun = 16;

inline Operand dense(const void* data, int64_t line_stride, int64_t depth_stride) {
  return {data, line_stride, depth_stride, 0, nullptr, nullptr, false, nullptr,
          0,    0,           nullptr,      0, false,   false};
}

template <bool kPairs>
FT_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
#if FT_BF16_DOT
  if constexpr (kPairs) return dot_pairs(a, b, c);
#endif
  return fma(a, b, c);
}

// The same with one item for all lanes.
template <bool kPairs>
FT_INLINE Vec multiply_add(const float* a, Vec b, Vec c) {
#if FT_BF16_DOT
  if constexpr (kPairs) return dot_pairs(a, b, c);
#endif
  return fma(a, b, c);
}

// n values from p that are neighbours in depth, as items; bits selects.
template <bool kPairs, class T>
FT_INLINE Vec load_items(const T* p, int n) {
#if FT_BF16_DOT
  if constexpr (kPairs) return load_pairs(p, n);
#endif
  return load(p, n);
}
template <bool kPairs>
FT_INLINE Vec select_items(Vec v, uint32_t bits) {
#if FT_BF16_DOT
  if constexpr (kPairs) return select_pairs(v, bits);
#endif
  return select(v, bits);
}

// Lines whose values are neighbours in memory: transposed in registers, a whole square of them
// where `kWhole`.
template <class T, bool kPairs, bool kMasked, bool kWhole>
FT_INLINE void pack_square(const Operand& a, int64_t line, int lines, int64_t p, int n,
                           float* strip) {
  constexpr int kPerItem = kPairs ? 2 : 1;
  const int count = kWhole ? kLanes * kPerItem : n, used = (count + kPerItem - 1) / kPerItem;
  const T* const data = static_cast<const T*>(a.data) + line * a.line_stride + p;
  Vec items[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    items[i] = zero();
    if (!kWhole && i >= lines) continue;
    // The next strip's, into the second level: the hardware does not foresee so many streams.
    __builtin_prefetch(data + (i + kLanes) * a.line_stride, 0, 2);
    items[i] = load_items<kPairs>(data + i * a.line_stride, count);
    if (kMasked)
      items[i] =
          select_items<kPairs>(items[i], keep_bits(a.mask, (line + i) * a.mask_line_stride + p));
  }
  transpose(items);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (kWhole || i < used) store(strip + i * kLanes, items[i]);
}

template <class T, bool kPairs, bool kMasked>
void pack_lines(const Operand& a, int64_t line, int lines, int64_t begin, int64_t end,
                float* strip) {
  constexpr int kStep = kLanes * (kPairs ? 2 : 1);
  int64_t p = begin;
  if (lines == kLanes)
    for (; p + kStep <= end; p += kStep, strip += kLanes * kLanes)
      pack_square<T, kPairs, kMasked, true>(a, line, lines, p, kStep, strip);
  for (; p < end; p += kStep, strip += kLanes * kLanes)
    pack_square<T, kPairs, kMasked, false>(a, line, lines, p, int(lesser(kStep, end - p)), strip);
}

// Lines that are neighbours in memory: copied.
template <class T, bool kPairs>
void pack_across(const Operand& a, int64_t line, int lines, int64_t begin, int64_t end,
                 float* strip) {
  const T* const data = static_cast<const T*>(a.data) + line;
  const auto items = [&](int64_t p) {
    __builtin_prefetch(data + (p + kShortRun) * a.depth_stride);
    const Vec v = load(data + p * a.depth_stride, lines);
    return a.mask ? select(v, keep_bits(a.mask, line + p * a.mask_depth_stride)) : v;
  };
  if constexpr (kPairs) {
#if FT_BF16_DOT
    for (int64_t p = begin; p < end; p += 2, strip += kLanes)
      store(strip, zip_pairs(items(p), p + 1 < end ? items(p + 1) : zero()));
#endif
  } else {
    for (int64_t p = begin; p < end; ++p, strip += kLanes) store(strip, items(p));
  }
}

// Any strides: gathered into short lines first.
template <class T, bool kPairs>
void pack_gathered(const Operand& a, int64_t line, int lines, int64_t begin, int64_t end,
                   float* strip) {
  constexpr int kPerItem = kPairs ? 2 : 1, kRun = 4 * kLanes * kPerItem;
  T gathered[kLanes * kRun];
  for (int64_t p = begin; p < end; p += kRun) {
    const int n = int(lesser(kRun, end - p));
    for (int i = 0; i < lines; ++i)
      for (int q = 0; q < n; ++q) {
        const int64_t element = (line + i) * a.mask_line_stride + (p + q) * a.mask_depth_stride;
        const bool kept = !a.mask || keep_bits(a.mask, element) & 1;
        const T* from =
            static_cast<const T*>(a.data) + (line + i) * a.line_stride + (p + q) * a.depth_stride;
        gathered[i * kRun + q] = kept ? *from : T{};
      }
    const Operand run = dense(gathered, kRun, 1);
    pack_lines<T, kPairs, false>(run, 0, lines, 0, n, strip);
    strip += (n + kPerItem - 1) / kPerItem * kLanes;
  }
}

template <class T, bool kPairs>
auto dense_packer(const Operand& a) {
  if (a.depth_stride == 1 && !a.mask) return pack_lines<T, kPairs, false>;
  if (a.depth_stride == 1 && a.mask_depth_stride == 1) return pack_lines<T, kPairs, true>;
  if (a.line_stride == 1 && (!a.mask || a.mask_line_stride == 1)) return pack_across<T, kPairs>;
  return pack_gathered<T, kPairs>;
}

// For an operand that has no producer yet.
inline void choose_packer(Operand& a, int32_t dtype, bool pairs) {
  if (a.pack || a.panel) return;
  a.short_runs = a.depth_stride != 1;
  a.value_bytes = dtype == FT_FLOAT32 ? 4 : 2;
  if (dtype == FT_FLOAT32)
    a.pack = dense_packer<float, false>(a);
  else if (dtype == FT_FLOAT16)
    a.pack = dense_packer<fp16, false>(a);
  else
    a.pack = pairs ? dense_packer<bf16, FT_BF16_DOT>(a) : dense_packer<bf16, false>(a);
}

}  // namespace
