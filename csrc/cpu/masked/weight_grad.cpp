#include "cpu/masked/weight_grad.h"

#include <new>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "fastft/api.h"
#include "fastft/status.h"

#define FT_BODY "cpu/masked/weight_grad.inl.hpp"
#include "cpu/isa.h"

namespace fastft {
namespace {

// By ft_isa.
constexpr const MaskedWeightGradKernels* kLevels[] = {
    &scalar::kMaskedWeightGrad,
#if defined(__x86_64__)
    &avx2::kMaskedWeightGrad,
    &avx512::kMaskedWeightGrad,
    &avx512_bf16::kMaskedWeightGrad,
#endif
};

}  // namespace
}  // namespace fastft

int ft_cpu_masked_weight_grad(float* values, const void* grad, const void* x, const void* index,
                              int64_t m, int64_t n, int64_t k, int64_t grad_stride_m,
                              int64_t grad_stride_n, int64_t x_stride_m, int64_t x_stride_k,
                              int64_t count, int64_t rows, int64_t columns, int32_t index_bytes,
                              int32_t dtype, int32_t threads) {
  using namespace fastft;
  const char* name = "cpu_masked_weight_grad";
  FT_CHECK(dtype >= FT_FLOAT32 && dtype <= FT_FLOAT16, "%s: unknown dtype code %d", name, dtype);
  FT_CHECK(m >= 0 && n >= 0 && k >= 0, "%s: sizes m %lld, n %lld, k %lld are not a layer's", name,
           static_cast<long long>(m), static_cast<long long>(n), static_cast<long long>(k));
  threads = usable_threads(threads);
  const Rectangles at{index, count, rows, columns, k, n * k, index_bytes};
  if (check_rectangles(name, at, threads)) return 1;
  try {
    kLevels[active_isa()]->weight_grad({values, grad, x, m, n, k, grad_stride_m, grad_stride_n,
                                        x_stride_m, x_stride_k, at, dtype, threads});
  } catch (const std::bad_alloc&) {
    return fail("%s: no memory for scratch buffers", name);
  }
  return 0;
}
