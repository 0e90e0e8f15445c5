// The gradient of a weight at its trained entries, as the dispatcher hands it to a level.
#pragma once
#include <cstdint>

#include "cpu/masked/rectangles.h"

namespace fastft {

struct MaskedWeightGrad {
  float* values;
  const void *grad, *x;
  int64_t m, n, k, grad_stride_m, grad_stride_n, x_stride_m, x_stride_k;
  Rectangles at;
  int32_t dtype;
  int threads;
};

struct MaskedWeightGradKernels {
  void (*weight_grad)(const MaskedWeightGrad&);
};

}  // namespace fastft
