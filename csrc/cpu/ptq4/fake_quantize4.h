// One call of fake_quantize4, as the dispatcher hands it to a level.
#pragma once
#include "cpu/ptq4/quantize.h"

namespace fastft {

struct FakeQuantize4 {
  void* y;  // forward; dx in the backward
  float *dscale, *dzero;
  Activations x, grad;
  LearnedRange range;
  int64_t group_size;
  int threads;
};

struct FakeQuantize4Kernels {
  void (*forward)(const FakeQuantize4&);
  void (*backward)(const FakeQuantize4&);
};

}  // namespace fastft
