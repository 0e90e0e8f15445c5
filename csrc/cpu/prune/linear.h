// One call of block_sparse_linear or of its backward, as the dispatcher hands it to a level.
#pragma once
#include <cstdint>

namespace fastft {

struct BlockSparseLinear {
  void *y, *dx, *dvalues, *dbias;
  const void *x, *values, *bias, *grad;
  const int32_t* index;
  int64_t m, n, k, blocks, rows, columns;
  int64_t x_stride_m, x_stride_k, grad_stride_m, grad_stride_n;
  int32_t dtype;
  int threads;
};

struct PruneKernels {
  void (*forward)(const BlockSparseLinear&);
  void (*backward)(const BlockSparseLinear&);
};

}  // namespace fastft
