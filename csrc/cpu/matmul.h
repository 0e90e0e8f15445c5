// One call of the GEMM core's own kernels, as the dispatcher hands it to a level.
#pragma once
#include <cstdint>

namespace fastft {

struct Matmul {
  void* c;
  const void *a, *b, *packed_b;
  int64_t m, n, k, a_stride_m, a_stride_k, b_stride_n, b_stride_k;
  bool packed_transposed;
  int32_t dtype;
  int threads;
};

// A plain weight on one side, a packed one on the other.
struct WeightPacking {
  void* packed;
  void* weight;
  int64_t n, k, stride_n, stride_k;
  int32_t dtype;
  int threads;
};

struct MatmulKernels {
  void (*matmul)(const Matmul&);
  void (*pack_weight)(const WeightPacking&);
  void (*unpack_weight)(const WeightPacking&);
};

}  // namespace fastft
