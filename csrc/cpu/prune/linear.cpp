#include "cpu/prune/linear.h"

#include <new>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "fastft/api.h"
#include "fastft/status.h"

#define FT_BODY "cpu/prune/linear.inl.hpp"
#include "cpu/isa.h"

namespace fastft {
namespace {

// By ft_isa.
constexpr const PruneKernels* kLevels[] = {
    &scalar::kPrune,
#if defined(__x86_64__)
    &avx2::kPrune,
    &avx512::kPrune,
    &avx512_bf16::kPrune,
#endif
};

int run(const char* name, void (*PruneKernels::*kernel)(const BlockSparseLinear&),
        BlockSparseLinear call) {
  FT_CHECK(call.dtype >= FT_FLOAT32 && call.dtype <= FT_FLOAT16, "%s: unknown dtype code %d", name,
           call.dtype);
  FT_CHECK(call.m >= 0 && call.n >= 0 && call.k >= 0 && call.blocks >= 0,
           "%s: sizes m %lld, n %lld, k %lld, blocks %lld are not a layer's", name,
           static_cast<long long>(call.m), static_cast<long long>(call.n),
           static_cast<long long>(call.k), static_cast<long long>(call.blocks));
  FT_CHECK(call.rows > 0 && call.columns > 0, "%s: blocks of %lld x %lld", name,
           static_cast<long long>(call.rows), static_cast<long long>(call.columns));
  call.threads = usable_threads(call.threads);
  try {
    (kLevels[active_isa()]->*kernel)(call);
  } catch (const std::bad_alloc&) {
    return fail("%s: no memory for scratch buffers", name);
  }
  return 0;
}

}  // namespace
}  // namespace fastft

int ft_cpu_block_sparse_linear(void* y, const void* x, const void* values, const void* bias,
                               const int32_t* index, int64_t m, int64_t n, int64_t k,
                               int64_t blocks, int64_t rows, int64_t columns, int64_t x_stride_m,
                               int64_t x_stride_k, int32_t dtype, int32_t threads) {
  return fastft::run(
      "cpu_block_sparse_linear", &fastft::PruneKernels::forward,
      {y, nullptr, nullptr, nullptr, x,          values,     bias, nullptr, index, m,      n,
       k, blocks,  rows,    columns, x_stride_m, x_stride_k, 0,    0,       dtype, threads});
}

int ft_cpu_block_sparse_linear_backward(void* dx, void* dvalues, void* dbias, const void* grad,
                                        const void* x, const void* values, const int32_t* index,
                                        int64_t m, int64_t n, int64_t k, int64_t blocks,
                                        int64_t rows, int64_t columns, int64_t grad_stride_m,
                                        int64_t grad_stride_n, int64_t x_stride_m,
                                        int64_t x_stride_k, int32_t dtype, int32_t threads) {
  return fastft::run("cpu_block_sparse_linear_backward", &fastft::PruneKernels::backward,
                     {nullptr,       dx,    dvalues, dbias,      x,          values,
                      nullptr,       grad,  index,   m,          n,          k,
                      blocks,        rows,  columns, x_stride_m, x_stride_k, grad_stride_m,
                      grad_stride_n, dtype, threads});
}
