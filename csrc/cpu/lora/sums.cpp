#include "cpu/lora/sums.h"

#include <new>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "fastft/api.h"
#include "fastft/status.h"

#define FT_BODY "cpu/lora/sums.inl.hpp"
#include "cpu/isa.h"

namespace fastft {
namespace {

// By ft_isa.
constexpr const SumKernels* kLevels[] = {
    &scalar::kSums,
#if defined(__x86_64__)
    &avx2::kSums,
    &avx512::kSums,
    &avx512_bf16::kSums,
#endif
};

int check_dtype(const char* name, int32_t dtype) {
  FT_CHECK(dtype >= FT_FLOAT32 && dtype <= FT_FLOAT16, "%s: unknown dtype code %d", name, dtype);
  return 0;
}

int check_sizes(const char* name, int64_t rows, int64_t columns, int64_t r) {
  FT_CHECK(rows >= 0 && columns >= 0 && r >= 0, "%s: %lld, %lld and %lld are not sizes", name,
           static_cast<long long>(rows), static_cast<long long>(columns),
           static_cast<long long>(r));
  return 0;
}

template <class Call>
int run(const char* name, void (*SumKernels::*kernel)(const Call&), const Call& call) {
  try {
    (kLevels[active_isa()]->*kernel)(call);
  } catch (const std::bad_alloc&) {
    return fail("%s: no memory for scratch buffers", name);
  }
  return 0;
}

}  // namespace
}  // namespace fastft

int ft_cpu_dora_norm(float* norm, const void* weight, const void* lora_a, const void* lora_b,
                     const float* scaling, int64_t n, int64_t k, int64_t r, int64_t weight_stride_n,
                     int64_t weight_stride_k, int32_t dtype, int32_t adapter_dtype,
                     int32_t threads) {
  using namespace fastft;
  const char* name = "cpu_dora_norm";
  if (check_dtype(name, dtype) || check_dtype(name, adapter_dtype) || check_sizes(name, n, k, r))
    return 1;
  return run(name, &SumKernels::dora_norm,
             DoraNorm{norm, weight, lora_a, lora_b, n ? *scaling : 0.0f, n, k, r, weight_stride_n,
                      weight_stride_k, dtype, adapter_dtype, usable_threads(threads)});
}

int ft_cpu_scale_columns(void* y, const void* x, const float* scale, const void* bias, int64_t m,
                         int64_t n, int64_t x_stride_m, int64_t x_stride_n, int32_t dtype,
                         int32_t threads) {
  using namespace fastft;
  const char* name = "cpu_scale_columns";
  if (check_dtype(name, dtype) || check_sizes(name, m, n, 0)) return 1;
  return run(name, &SumKernels::scale_columns,
             ScaleColumns{y, x, scale, bias, nullptr, nullptr, nullptr, m, n, x_stride_m,
                          x_stride_n, 0, 0, dtype, usable_threads(threads)});
}

int ft_cpu_scale_columns_backward(void* dx, float* dscale, void* dbias, const void* grad,
                                  const void* x, const float* scale, int64_t m, int64_t n,
                                  int64_t grad_stride_m, int64_t grad_stride_n, int64_t x_stride_m,
                                  int64_t x_stride_n, int32_t dtype, int32_t threads) {
  using namespace fastft;
  const char* name = "cpu_scale_columns_backward";
  if (check_dtype(name, dtype) || check_sizes(name, m, n, 0)) return 1;
  return run(name, &SumKernels::scale_columns_backward,
             ScaleColumns{dx, grad, scale, nullptr, dscale, dbias, x, m, n, grad_stride_m,
                          grad_stride_n, x_stride_m, x_stride_n, dtype, usable_threads(threads)});
}

int ft_cpu_abs_row_sums(float* sums, const void* u, const void* v, const void* w, int64_t n,
                        int64_t k, int64_t r, int64_t u_stride_n, int64_t u_stride_r,
                        int64_t v_stride_k, int64_t v_stride_r, int64_t w_stride_n,
                        int64_t w_stride_k, int32_t dtype, int32_t threads) {
  using namespace fastft;
  const char* name = "cpu_abs_row_sums";
  if (check_dtype(name, dtype) || check_sizes(name, n, k, r)) return 1;
  return run(
      name, &SumKernels::abs_row_sums,
      AbsRowSums{sums, nullptr, nullptr, nullptr, nullptr, u, v, w, n, k, r, u_stride_n, u_stride_r,
                 v_stride_k, v_stride_r, w_stride_n, w_stride_k, dtype, usable_threads(threads)});
}

int ft_cpu_abs_row_sums_backward(void* du, void* dv, void* dw, const float* grad, const void* u,
                                 const void* v, const void* w, int64_t n, int64_t k, int64_t r,
                                 int64_t u_stride_n, int64_t u_stride_r, int64_t v_stride_k,
                                 int64_t v_stride_r, int64_t w_stride_n, int64_t w_stride_k,
                                 int32_t dtype, int32_t threads) {
  using namespace fastft;
  const char* name = "cpu_abs_row_sums_backward";
  if (check_dtype(name, dtype) || check_sizes(name, n, k, r)) return 1;
  return run(
      name, &SumKernels::abs_row_sums_backward,
      AbsRowSums{nullptr, du, dv, dw, grad, u, v, w, n, k, r, u_stride_n, u_stride_r, v_stride_k,
                 v_stride_r, w_stride_n, w_stride_k, dtype, usable_threads(threads)});
}
