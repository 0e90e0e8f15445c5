// Activations that are quantized, as calls of kernels name them.
#pragma once
#include <cstdint>

namespace fastft {

// x (m, k); its feature perm[j], or j where perm is null, has place j, in group j / group_size.
struct Activations {
  const void* data;
  int64_t m, k, stride_m, stride_k;
  const int32_t* perm;
  int32_t dtype;
};

// The range of 4-bit activations: of one group, which is all of them, or of each.
struct LearnedRange {
  const float *scale, *zero;
  int64_t groups;
};

}  // namespace fastft
