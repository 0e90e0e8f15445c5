// One call of an op of the family, as the dispatcher hands it to a level.
#pragma once
#include <cstdint>

#include "cpu/lora/linear.h"
#include "cpu/ptq4/weight.h"

namespace fastft {

struct Int4Dequantize {
  void* weight;
  Int4Weight w;
  int32_t dtype;
  int threads;
};

// y = x W^T + b, and what the gradients of that need; a null output is not computed.
struct Int4Call {
  void *y, *dx, *dscale, *dzero, *dbias;
  const void *x, *grad, *bias;
  Int4Weight w;
  int64_t m, x_stride_m, x_stride_k, grad_stride_m, grad_stride_n;
  int32_t dtype;
  int threads;
};

struct Int4Kernels {
  void (*dequantize)(const Int4Dequantize&);
  void (*forward)(const Int4Call&);
  void (*backward)(const Int4Call&);
  // The same with one adapter, whose layer has no base of its own.
  void (*lora_forward)(const Int4Call&, const LoraCall&);
  void (*lora_backward)(const Int4Call&, const LoraCall&);
};

}  // namespace fastft
