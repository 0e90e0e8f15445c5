// Panels: operands packed over their whole depth, in one call or once for many (pack.h).
#include "cpu/operand.inl.hpp"

namespace {

// The low-rank products are a small part of the work and a large part of the gradients' error.
// Not a power of two, or the packed strips would compete for the same sets of the cache.
constexpr int64_t kShortDepthItems = 72;

// The dimension that a product sums over.
struct Depth {
  int64_t values;
  bool pairs;     // items are two bf16 values; needs FT_BF16_DOT
  int64_t block;  // items summed up from zero, then added to what stands

  int64_t items() const { return pairs ? ceil_div(values, 2) : values; }
};

// A range of lines cut into strips of equal height.
struct Strips {
  int64_t begin, end;  // lines
  int height;

  int64_t count() const { return ceil_div(end - begin, height); }
  int64_t line(int64_t strip) const { return begin + strip * height; }
  int lines(int64_t strip) const { return int(lesser(height, end - line(strip))); }
};

// Lines packed as [block of depth][strip][item][lane].
struct Panel {
  const float* data;
  int64_t strips;
  int64_t first;  // the strip that counts as strip 0

  // The strip's items of a block of depth, which begins at item p and has `block` items.
  const float* at(int64_t p, int64_t strip, int64_t block) const {
    return data + (p * strips + (first + strip) * block) * kLanes;
  }
};

inline int64_t panel_floats(const Depth& depth, const Strips& strips) {
  return depth.items() * strips.count() * kLanes;
}

// Pack items [first, last) of strips [s0, s1) as [strip][item][lane].
inline void pack_strips(const Operand& a, const Depth& depth, const Strips& strips, int64_t s0,
                        int64_t s1, int64_t first, int64_t last, float* to) {
  const int per_item = depth.pairs ? 2 : 1;
  const int64_t run = a.short_runs ? kShortRun : last - first;
  for (int64_t p = first; p < last; p += run) {
    const int64_t end = lesser(lesser(p + run, last) * per_item, depth.values);
    for (int64_t s = s0; s < s1; ++s)
      a.pack(a, strips.line(s), strips.lines(s), p * per_item, end,
             to + ((s - s0) * (last - first) + p - first) * kLanes);
  }
}

// Memory that will be needed next, to be asked for meanwhile: for every item and strip a line of
// the cache, so many bytes from that of the item before, after kLanes items, and of the strip
// before.
struct Ahead {
  const char* at;
  int64_t step, jump, strip;
};

// Two strips from `line` on, and items from p on.
inline Ahead ahead_of(const Operand& a, const Depth& depth, int64_t line, int64_t p) {
  constexpr int64_t kItem = kLanes * sizeof(float);
  const int64_t per_item = depth.pairs ? 2 : 1;
  const int64_t line_bytes = a.line_stride * a.value_bytes;
  const int64_t item_bytes = a.depth_stride * per_item * a.value_bytes;
  const char* at = static_cast<const char*>(a.data) + line * line_bytes + p * item_bytes;
  if (a.depth_stride == 1)
    return {at, line_bytes, kItem - kLanes * line_bytes, kLanes * line_bytes};
  return {at, item_bytes, 0, depth.pairs ? item_bytes / 2 : kLanes * line_bytes};
}

// Two packed strips with so many items; 0: nothing.
inline Ahead ahead_of(const float* strips, int64_t items) {
  constexpr int64_t kItem = kLanes * sizeof(float);
  return {reinterpret_cast<const char*>(strips), items ? kItem : 0, 0, items * kItem};
}

// An operand, and where its panel goes.
struct Packing {
  Operand operand;
  Depth depth;
  float* panel;
};

// Pack panels of the same lines, in tasks of a few strips.
inline void pack_panels(const Packing* packings, int count, const Strips& strips, int threads) {
  const int64_t group = greater(1, lesser(kBlockColumns / kLanes, strips.count() / (4 * threads)));
  const int64_t tasks = count ? ceil_div(strips.count(), group) : 0;
  parallel_for(tasks > 1 ? threads : 1, tasks, [&](int64_t task, int) {
    const int64_t s0 = task * group, s1 = lesser(s0 + group, strips.count());
    for (const Packing* one = packings; one < packings + count; ++one) {
      const int64_t items = one->depth.items();
      for (int64_t p = 0; p < items; p += one->depth.block) {
        const int64_t block = lesser(one->depth.block, items - p);
        pack_strips(one->operand, one->depth, strips, s0, s1, p, p + block,
                    one->panel + (p * strips.count() + s0 * block) * kLanes);
      }
    }
  });
}

// ---- weights packed once -------------------------------------------------------------------

#if FT_BF16_DOT
using Bf16Item = uint32_t;
#else
using Bf16Item = bf16;
#endif

inline const PackedWeight& header_of(const void* packed) {
  return *static_cast<const PackedWeight*>(packed);
}
inline Strips strips_of(const PackedWeight& w) { return {0, w.n, kLanes}; }
inline Depth depth_of(const PackedWeight& w) { return {w.k, w.pairs != 0, w.block}; }

// Where items [first, ...) of a strip stand, as far as their block of depth goes.
template <class T>
auto packed_items(const PackedWeight& w, int64_t strip, int64_t first) {
  const int64_t p = first / w.block * w.block;
  const int64_t block = lesser(w.block, depth_of(w).items() - p);
  const int64_t item = p * strips_of(w).count() + strip * block + first - p;
  const int64_t item_bytes = w.dtype == FT_FLOAT32 || w.pairs ? 4 : 2;
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(&w + 1) +
                                    item * kLanes * item_bytes);
}

// Half-precision values that the level has no instruction for, widened.
template <class T>
void pack_widened(const Operand& a, int64_t line, int, int64_t begin, int64_t end, float* strip) {
  const T* from = packed_items<T>(header_of(a.data), line / kLanes, begin);
  for (int64_t p = begin; p < end; ++p, from += kLanes, strip += kLanes)
    store(strip, load(from, kLanes));
}

// Lines are what was depth, and depth, from a multiple of kLanes on, what was lines: the values of
// kLanes lines are brought together as they lay before they were packed.
template <class T, class Item>
void pack_across_packed(const Operand& a, int64_t line, int lines, int64_t begin, int64_t end,
                        float* strip) {
  constexpr bool kPairs = sizeof(Item) > sizeof(T);
  constexpr int kPerItem = kPairs ? 2 : 1, kRun = kLanes * kPerItem;
  const PackedWeight& w = header_of(a.data);
  T values[kLanes * kRun];
  for (int64_t p = begin; p < end; p += kRun) {
    const int n = int(lesser(kRun, end - p));
    for (int first = 0; first < n; first += kLanes) {
      const Item* from = packed_items<Item>(w, (p + first) / kLanes, line / kPerItem);
      for (int i = 0; i < lines; ++i) {
        T* to = values + i * kRun + first;
        for (int lane = 0; lane < kLanes; ++lane)
          if constexpr (kPairs)
            to[lane] = T{uint16_t(from[i / 2 * kLanes + lane] >> i % 2 * 16)};
          else
            to[lane] = from[i * kLanes + lane];
      }
    }
    const Operand run = dense(values, kRun, 1);
    pack_lines<T, kPairs, false>(run, 0, lines, 0, n, strip);
    strip += (n + kPerItem - 1) / kPerItem * kLanes;
  }
}

// W (n, k) as the columns of a product over k.
inline Operand packed_columns(const void* packed) {
  const PackedWeight& w = header_of(packed);
  Operand a = dense(packed, 0, 0);
  if (w.dtype == FT_FLOAT32 || w.pairs) {
    a.panel = reinterpret_cast<const float*>(&w + 1);
    a.panel_strips = strips_of(w).count();
  } else {
    a.pack = w.dtype == FT_BFLOAT16 ? pack_widened<bf16> : pack_widened<fp16>;
  }
  return a;
}

// W (n, k) as the columns of a product over n, that is W^T.
inline Operand packed_transposed(const void* packed) {
  const PackedWeight& w = header_of(packed);
  Operand a = dense(packed, 0, 0);
  a.short_runs = true;
  if (w.dtype == FT_FLOAT32)
    a.pack = pack_across_packed<float, float>;
  else if (w.dtype == FT_FLOAT16)
    a.pack = pack_across_packed<fp16, fp16>;
  else
    a.pack = pack_across_packed<bf16, Bf16Item>;
  return a;
}

}  // namespace
