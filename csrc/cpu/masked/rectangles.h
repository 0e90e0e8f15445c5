// The trained part of a weight (N, K): equal rectangles, sorted by where they begin.
//
// Elements are rectangles of 1 x 1, rows of 1 x K, columns of N x 1, blocks of their own size, the
// heads of a projection of head_size x K or N x head_size, a whole weight of N x K. Values stand
// rectangle by rectangle, each row after row.
#pragma once
#include <cstdint>

namespace fastft {

struct Rectangles {
  const void* index;  // the flat offset of each rectangle's first element, ascending
  int64_t count, rows, columns;
  int64_t stride;       // K
  int64_t size;         // N * K
  int64_t index_bytes;  // 4 or 8

  int64_t area() const { return rows * columns; }
  int64_t values() const { return count * area(); }
  int64_t start(int64_t rectangle) const {
    return index_bytes == 4 ? static_cast<const int32_t*>(index)[rectangle]
                            : static_cast<const int64_t*>(index)[rectangle];
  }
};

// Fails, as FT_CHECK does, unless the offsets ascend and all rectangles lie within the weight and
// on a grid of their own size, so that they neither overlap nor leave it.
int check_rectangles(const char* name, const Rectangles& r, int threads);

}  // namespace fastft
