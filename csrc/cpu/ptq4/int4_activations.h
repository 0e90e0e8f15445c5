// One call of the products of 4-bit weights with quantized activations, as the dispatcher hands it
// to a level.
#pragma once
#include "cpu/ptq4/quantize.h"
#include "cpu/ptq4/weight.h"

namespace fastft {

// The codebook is int4; x has the weight's perm.
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
