// One call of the lora kernels, as the dispatcher hands it to a level.
#pragma once
#include <cstdint>

#include "fastft/philox.h"

namespace fastft {

struct LoraForward {
  void *y, *xa;
  const void *x, *weight, *lora_a, *lora_b, *bias;
  float scaling;
  Dropout dropout;
  int64_t m, n, k, r, x_stride_m, x_stride_k, weight_stride_n, weight_stride_k;
  int32_t dtype, adapter_dtype;
  int threads;
};

struct LoraBackward {
  void *dx, *dweight, *dlora_a, *dlora_b, *dbias;
  float* dscaling;
  const void *grad, *x, *weight, *lora_a, *lora_b, *xa;
  float scaling;
  Dropout dropout;
  int64_t m, n, k, r, grad_stride_m, grad_stride_n, x_stride_m, x_stride_k, weight_stride_n,
      weight_stride_k;
  int32_t dtype, adapter_dtype;
  int threads;
};

struct LoraKernels {
  void (*forward)(const LoraForward&);
  void (*backward)(const LoraBackward&);
};

}  // namespace fastft
