// Panels: operands packed over their whole depth.
#include "cpu/operand.inl.hpp"

namespace {

// Two column strips stay in the first-level cache while the rows' block, half of the second level,
// passes by.
constexpr int64_t kDepthItems = 384;
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

}  // namespace
