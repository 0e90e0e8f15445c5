#include "cpu/lora.h"

#include <new>

#include "cpu/dispatch.h"
#include "fastft/api.h"
#include "fastft/status.h"

#define FT_BODY "cpu/lora.inl.hpp"
#include "cpu/isa.h"

namespace fastft {
namespace {

// By ft_isa.
constexpr const LoraKernels* kLevels[] = {
    &scalar::kLora,
#if defined(__x86_64__)
    &avx2::kLora,
    &avx512::kLora,
    &avx512_bf16::kLora,
#endif
};

int check_dtypes(const char* name, int32_t dtype, int32_t adapter_dtype) {
  FT_CHECK(dtype >= FT_FLOAT32 && dtype <= FT_FLOAT16, "%s: unknown dtype code %d", name, dtype);
  FT_CHECK(adapter_dtype == dtype || adapter_dtype == FT_FLOAT32,
           "%s: adapter dtype code %d beside base dtype code %d", name, adapter_dtype, dtype);
  return 0;
}

int check_sizes(const char* name, int64_t m, int64_t n, int64_t k, int64_t r) {
  FT_CHECK(m >= 0 && n >= 0 && k >= 0 && r >= 1,
           "%s: sizes m %lld, n %lld, k %lld, r %lld are not a layer's", name,
           static_cast<long long>(m), static_cast<long long>(n), static_cast<long long>(k),
           static_cast<long long>(r));
  return 0;
}

int check_threshold(const char* name, uint32_t threshold, const int64_t* rng) {
  FT_CHECK(threshold <= 65536, "%s: threshold %u is above 65536", name, threshold);
  FT_CHECK(!threshold || rng, "%s: dropout without rng", name);
  return 0;
}

}  // namespace
}  // namespace fastft

int ft_cpu_lora_linear(void* y, void* xa, const void* x, const void* weight, const void* lora_a,
                       const void* lora_b, const void* bias, const float* scaling,
                       const int64_t* rng, int64_t m, int64_t n, int64_t k, int64_t r,
                       int64_t x_stride_m, int64_t x_stride_k, int64_t weight_stride_n,
                       int64_t weight_stride_k, uint32_t threshold, int32_t dtype,
                       int32_t adapter_dtype, int32_t threads) {
  using namespace fastft;
  const char* name = "cpu_lora_linear";
  if (check_dtypes(name, dtype, adapter_dtype) || check_sizes(name, m, n, k, r) ||
      check_threshold(name, threshold, rng))
    return 1;
  try {
    kLevels[active_isa()]->forward({y,
                                    xa,
                                    x,
                                    weight,
                                    lora_a,
                                    lora_b,
                                    bias,
                                    *scaling,
                                    make_dropout(rng, threshold),
                                    m,
                                    n,
                                    k,
                                    r,
                                    x_stride_m,
                                    x_stride_k,
                                    weight_stride_n,
                                    weight_stride_k,
                                    dtype,
                                    adapter_dtype,
                                    usable_threads(threads)});
  } catch (const std::bad_alloc&) {
    return fail("%s: no memory for scratch buffers", name);
  }
  return 0;
}

int ft_cpu_lora_linear_backward(void* dx, void* dweight, void* dlora_a, void* dlora_b, void* dbias,
                                float* dscaling, const void* grad, const void* x,
                                const void* weight, const void* lora_a, const void* lora_b,
                                const void* xa, const float* scaling, const int64_t* rng, int64_t m,
                                int64_t n, int64_t k, int64_t r, int64_t grad_stride_m,
                                int64_t grad_stride_n, int64_t x_stride_m, int64_t x_stride_k,
                                int64_t weight_stride_n, int64_t weight_stride_k,
                                uint32_t threshold, int32_t dtype, int32_t adapter_dtype,
                                int32_t threads) {
  using namespace fastft;
  const char* name = "cpu_lora_linear_backward";
  if (check_dtypes(name, dtype, adapter_dtype) || check_sizes(name, m, n, k, r) ||
      check_threshold(name, threshold, rng))
    return 1;
  try {
    kLevels[active_isa()]->backward({dx,
                                     dweight,
                                     dlora_a,
                                     dlora_b,
                                     dbias,
                                     dscaling,
                                     grad,
                                     x,
                                     weight,
                                     lora_a,
                                     lora_b,
                                     xa,
                                     *scaling,
                                     make_dropout(rng, threshold),
                                     m,
                                     n,
                                     k,
                                     r,
                                     grad_stride_m,
                                     grad_stride_n,
                                     x_stride_m,
                                     x_stride_k,
                                     weight_stride_n,
                                     weight_stride_k,
                                     dtype,
                                     adapter_dtype,
                                     usable_threads(threads)});
  } catch (const std::bad_alloc&) {
    return fail("%s: no memory for scratch buffers", name);
  }
  return 0;
}
