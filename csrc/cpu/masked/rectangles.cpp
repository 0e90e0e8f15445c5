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
  if (check_sizes(name, r)) return 1;
  if (!r.count) return 0;
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
