#include "cpu/masked/rectangles.h"

#include <atomic>

#include "cpu/parallel.h"
#include "fastft/status.h"

namespace fastft {
namespace {

constexpr int64_t kChecked = int64_t(1) << 16;  // offsets of one task

// Whether an offset among [begin, end) is not above the one before it.
template <class Index>
bool descends(const Index* index, int64_t begin, int64_t end) {
  int found = 0;
  for (int64_t i = begin > 0 ? begin : 1; i < end; ++i) found |= index[i] <= index[i - 1];
  return found != 0;
}

bool off_grid(const Rectangles& r, int64_t begin, int64_t end) {
  bool found = false;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t start = r.start(i), row = start / r.stride, column = start - row * r.stride;
    found |= row % r.rows != 0 || column % r.columns != 0;
  }
  return found;
}

}  // namespace

int check_rectangles(const char* name, const Rectangles& r, int threads) {
  FT_CHECK(r.index_bytes == 4 || r.index_bytes == 8, "%s: index of %lld bytes", name,
           static_cast<long long>(r.index_bytes));
  FT_CHECK(r.count >= 0 && r.rows >= 1 && r.columns >= 1 && r.stride >= 0 && r.size >= 0,
           "%s: %lld rectangles of %lld x %lld in rows of %lld are no sizes", name,
           static_cast<long long>(r.count), static_cast<long long>(r.rows),
           static_cast<long long>(r.columns), static_cast<long long>(r.stride));
  if (!r.count) return 0;
  FT_CHECK(r.stride >= 1 && r.stride % r.columns == 0 && r.size % (r.stride * r.rows) == 0,
           "%s: rectangles of %lld x %lld do not tile rows of %lld of %lld elements", name,
           static_cast<long long>(r.rows), static_cast<long long>(r.columns),
           static_cast<long long>(r.stride), static_cast<long long>(r.size));
  std::atomic<bool> unordered{false}, misplaced{false};
  parallel_for(threads, ceil_div(r.count, kChecked), [&](int64_t task, int) {
    const int64_t begin = task * kChecked, end = lesser(r.count, begin + kChecked);
    if (r.index_bytes == 4 ? descends(static_cast<const int32_t*>(r.index), begin, end)
                           : descends(static_cast<const int64_t*>(r.index), begin, end))
      unordered = true;
    if (r.area() > 1 && off_grid(r, begin, end)) misplaced = true;
  });
  FT_CHECK(!unordered, "%s: index does not ascend", name);
  FT_CHECK(r.start(0) >= 0 && r.start(r.count - 1) < r.size,
           "%s: index from %lld to %lld is not within %lld elements", name,
           static_cast<long long>(r.start(0)), static_cast<long long>(r.start(r.count - 1)),
           static_cast<long long>(r.size));
  FT_CHECK(!misplaced, "%s: index holds rectangles off their grid of %lld x %lld", name,
           static_cast<long long>(r.rows), static_cast<long long>(r.columns));
  return 0;
}

}  // namespace fastft
