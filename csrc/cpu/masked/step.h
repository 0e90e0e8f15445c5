// One optimizer step on the trained parts of several weights, as the dispatcher hands it to a
// level.
#pragma once
#include <cstdint>

#include "cpu/masked/rectangles.h"

namespace fastft {

enum class StepMethod : int32_t { kAdamW, kSGD, kLion, kCount };

// What a step multiplies by, made once from the hyperparameters. By method, in this order:
//   AdamW  1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1^t),
//          sqrt(1 - beta2^t), eps
//   SGD    weight_decay, momentum, 1 - dampening, nesterov, lr, momentum; the first step has no
//          buffer yet: the first momentum is then 0, and dampening
//   Lion   1 - lr * weight_decay, 1 - beta1, 1 - beta2, lr
struct StepFactors {
  float sign;  // of the gradient
  float of[7];
};

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
