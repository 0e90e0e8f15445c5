// One optimizer step on the trained parts of several weights, as the dispatcher hands it to a
// level.
#pragma once
#include <cstdint>

#include "cpu/masked/rectangles.h"

namespace fastft {

struct StepSegment {
  void* weight;
  float *value, *first, *second;  // value null: the weight holds it
  const float* grad;
  Rectangles at;
  int32_t dtype;
  StepFactors factors;
  int64_t first_value;  // how many values the segments before have
};

struct Step {
  const StepSegment* segments;
  int64_t count, values;
  const int64_t* rng;  // null: weights are rounded to nearest
  StepMethod method;
  int threads;
};

struct StepKernels {
  void (*step)(const Step&);
};

}  // namespace fastft
