// Selection of the best entries of several tensors, as the dispatcher hands it to a level.
#pragma once
#include <cstdint>

#include "fastft/masked.h"

namespace fastft {

struct Scored {
  const void *a, *b;
  const void* exclude;  // ascending flat offsets that are left out
  int64_t size, columns, excluded, exclude_bytes;
  int32_t dtype;
  int64_t first;  // how many elements the tensors before have
};

struct Selection {
  int64_t* index;   // k positions in all tensors, one after the other
  int64_t* counts;  // of each tensor
  const Scored* tensors;
  int64_t count, size, k;
  const int64_t* rng;
  Score score;
  bool largest;
  int threads;
};

struct SelectKernels {
  // The number of entries found: k.
  int64_t (*select)(const Selection&);
};

}  // namespace fastft
