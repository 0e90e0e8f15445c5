// One call of lora_linear, lora_projections or lora_adapters, as the dispatcher hands it to a
// level.
#pragma once
#include <cstdint>

#include "fastft/api.h"
#include "fastft/philox.h"

namespace fastft {

// An adapter as the ABI has it, and what is made of that once per call.
struct LoraAdapter : ft_lora_adapter {
  float scaling_value;
  Dropout dropout;
  int64_t mask;  // where its mask begins, in bytes
  int64_t t;     // where its T^T begins, in floats: (r, rows) of a row stride of the call's m
};

// Either every layer has one adapter, on all rows, or one layer has them all, each on rows of its
// own.
struct LoraCall {
  const ft_lora_layer* layers;
  const LoraAdapter* adapters;
  int64_t layer_count, adapter_count;
  void* dx;
  const void* x;
  int64_t m, k, x_stride_m, x_stride_k;
  int64_t rank;         // the largest
  int64_t masks_bytes;  // of all masks
  int64_t t_floats;     // of all T
  bool copies_u;        // U is not S itself: gated, or beside the rows of others
  bool accumulate;      // y, or dx, holds what is added to
  int32_t dtype, adapter_dtype;
  int threads;
};

struct LoraKernels {
  void (*forward)(const LoraCall&);
  void (*backward)(const LoraCall&);
};

// Each brings two products to the sum that dx is.
constexpr int64_t kMaxProjections = 16;

}  // namespace fastft
