// One call of what works on weights and columns, as the dispatcher hands it to a level.
#pragma once
#include <cstdint>

namespace fastft {

struct DoraNorm {
  float* norm;
  const void *weight, *lora_a, *lora_b;
  float scaling;
  int64_t n, k, r, weight_stride_n, weight_stride_k;
  int32_t dtype, adapter_dtype;
  int threads;
};

struct AbsRowSums {
  float* sums;         // forward
  void *du, *dv, *dw;  // backward
  const float* grad;
  const void *u, *v, *w;
  int64_t n, k, r, u_stride_n, u_stride_r, v_stride_k, v_stride_r, w_stride_n, w_stride_k;
  int32_t dtype;
  int threads;
};

// In the backward y is dx and x is grad.
struct ScaleColumns {
  void* y;
  const void* x;
  const float* scale;
  const void* bias;
  float* dscale;
  void* dbias;
  const void* input;  // what dscale multiplies the gradient by
  int64_t m, n, x_stride_m, x_stride_n, input_stride_m, input_stride_n;
  int32_t dtype;
  int threads;
};

struct SumKernels {
  void (*dora_norm)(const DoraNorm&);
  void (*abs_row_sums)(const AbsRowSums&);
  void (*abs_row_sums_backward)(const AbsRowSums&);
  void (*scale_columns)(const ScaleColumns&);
  void (*scale_columns_backward)(const ScaleColumns&);
};

}  // namespace fastft
