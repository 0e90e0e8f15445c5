// Entries of a weight copied out and in, as the dispatcher hands them to a level.
#pragma once
#include <cstdint>

#include "cpu/masked/rectangles.h"

namespace fastft {

// Gathering, values is written; scattering, weight.
struct Entries {
  void *weight, *values;
  const float* alpha;  // scattering: null: weight = values; else weight += alpha * values
  Rectangles at;
  int32_t dtype, values_dtype;
  int threads;
};

struct EntryKernels {
  void (*gather)(const Entries&);
  void (*scatter)(const Entries&);
};

}  // namespace fastft
