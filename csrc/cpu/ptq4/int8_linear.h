// One call of int8_linear, as the dispatcher hands it to a level.
#pragma once
#include <cstdint>

namespace fastft {

// W[n, k] = scale[n] * code[n, k].
struct Int8Linear {
  void* y;  // forward
  const void* bias;
  void* dx;  // backward
  float* dscale;
  void* dbias;
  const void* grad;
  int64_t grad_stride_m, grad_stride_n;
  const void* x;  // both
  const int8_t* codes;
  const float* scale;
  int64_t m, n, k, x_stride_m, x_stride_k, codes_stride_n, codes_stride_k;
  int32_t dtype;
  int threads;
};

struct Int8LinearKernels {
  void (*forward)(const Int8Linear&);
  void (*backward)(const Int8Linear&);
};

}  // namespace fastft
