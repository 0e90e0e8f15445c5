// One call of the products of 4-bit weights with quantized activations, as the dispatcher hands it
// to a level.
#pragma once
#include "cpu/ptq4/quantize.h"

namespace fastft {

// W[n, perm[j]] = scale[n, j / group_size] * (code[n, j] - zero[n, j / group_size]); x has perm.
struct Int4Weight {
  const uint8_t* codes;  // (n, ceil(k / 2)), low nibble first
  const void* scale;     // (n, groups)
  const void* zero;      // (n, groups): uint8, or float; or null, which is 8
  int64_t n, k, group_size, groups;
  int32_t scale_dtype;
  bool float_zero;
};

struct Int4Activations {
  void* y;
  Activations x;
  LearnedRange range;  // of 4 bits; without a scale: 8 bits, ranged on the way
  Int4Weight weight;
  const void* bias;
  int threads;
};

struct Int4ActivationKernels {
  void (*linear)(const Int4Activations&);
};

}  // namespace fastft
