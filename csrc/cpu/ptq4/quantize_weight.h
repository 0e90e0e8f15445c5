// One call of a quantizer, as the dispatcher hands it to a level.
#pragma once
#include <cstdint>

namespace fastft {

struct Quantize {
  uint8_t* codes;      // (n, ceil(k / 2)), the even column in the low half of a byte
  void* scale;         // (n, groups) of scale_dtype, float16 stored as float
  void* zero;          // (n, groups): uint8, or as scale where HQQ does not round it; or null
  const void* weight;  // (n, k), columns next to each other
  const float* table;  // the codebook's 16 values, or null for integers
  int64_t n, k, group_size, weight_stride_n;
  bool symmetric;   // round-to-nearest alone: the zero-point is 8
  int32_t grid;     // ... candidates of the clip search
  bool round_zero;  // HQQ alone
  int32_t iterations;
  float power, beta, kappa;
  int32_t dtype, scale_dtype;
  int threads;
};

struct QuantizeKernels {
  void (*rtn_quantize)(const Quantize&);
  void (*hqq_quantize)(const Quantize&);
};

}  // namespace fastft
