#include "cpu/ptq4/int4_activations.h"

#include <new>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "fastft/api.h"
#include "fastft/status.h"

#define FT_BODY "cpu/ptq4/int4_activations.inl.hpp"
#include "cpu/isa.h"

namespace fastft {
namespace {

// By ft_isa.
constexpr const Int4ActivationKernels* kLevels[] = {
    &scalar::kInt4Activations,
#if defined(__x86_64__)
    &avx2::kInt4Activations,
    &avx512::kInt4Activations,
    &avx512_bf16::kInt4Activations,
#endif
};

// The bytes of a row of one group are summed up in 32 bits.
constexpr int64_t kMostOfGroup = int64_t(1) << 20;

int run(const char* name, const Int4Activations& f) {
  const Int4Weight& w = f.weight;
  FT_CHECK(f.x.dtype >= FT_FLOAT32 && f.x.dtype <= FT_FLOAT16, "%s: unknown dtype code %d", name,
           f.x.dtype);
  FT_CHECK(w.scale_dtype == FT_FLOAT32 || w.scale_dtype == FT_BFLOAT16,
           "%s: scale of dtype code %d", name, w.scale_dtype);
  FT_CHECK(f.x.m >= 0 && w.n >= 0 && w.k >= 0 && w.group_size > 0 && w.group_size <= kMostOfGroup,
           "%s: sizes m %lld, n %lld, k %lld, group_size %lld", name, static_cast<long long>(f.x.m),
           static_cast<long long>(w.n), static_cast<long long>(w.k),
           static_cast<long long>(w.group_size));
  const uint8_t* const zeros = w.float_zero ? nullptr : static_cast<const uint8_t*>(w.zero);
  for (int64_t at = 0; zeros && at < w.n * w.groups; ++at)
    FT_CHECK(zeros[at] <= 15, "%s: a zero of %d, which is no code", name, zeros[at]);
  if (check_perm(name, f.x.perm, w.k)) return 1;
  try {
    kLevels[active_isa()]->linear(f);
  } catch (const std::bad_alloc&) {
    return fail("%s: no memory for scratch buffers", name);
  }
  return 0;
}

}  // namespace
}  // namespace fastft

int ft_cpu_int4_linear_a8(void* y, const void* x, const uint8_t* codes, const void* scale,
                          const void* zero, const int32_t* perm, const void* bias, int64_t m,
                          int64_t n, int64_t k, int64_t group_size, int64_t x_stride_m,
                          int64_t x_stride_k, int32_t scale_dtype, int32_t float_zero,
                          int32_t dtype, int32_t threads) {
  using namespace fastft;
  const int64_t group = greater(1, lesser(group_size, k));
  return run("cpu_int4_linear_a8",
             {y,
              {x, m, k, x_stride_m, x_stride_k, perm, dtype},
              {nullptr, nullptr, 1},
              {codes, scale, zero, n, k, group, ceil_div(k, group), scale_dtype, float_zero != 0},
              bias,
              usable_threads(threads)});
}

int ft_cpu_int4_linear_a4(void* y, const void* x, const uint8_t* codes, const void* scale,
                          const uint8_t* zero, const int32_t* perm, const void* bias,
                          const float* x_scale, const float* x_zero, int64_t m, int64_t n,
                          int64_t k, int64_t group_size, int64_t x_groups, int64_t x_stride_m,
                          int64_t x_stride_k, int32_t scale_dtype, int32_t dtype, int32_t threads) {
  using namespace fastft;
  const char* name = "cpu_int4_linear_a4";
  const int64_t group = greater(1, lesser(group_size, k)), groups = ceil_div(k, group);
  FT_CHECK(x_groups == 1 || x_groups == groups, "%s: %lld ranges of x for %lld groups", name,
           static_cast<long long>(x_groups), static_cast<long long>(groups));
  return run(name, {y,
                    {x, m, k, x_stride_m, x_stride_k, perm, dtype},
                    {x_scale, x_zero, x_groups},
                    {codes, scale, zero, n, k, group, groups, scale_dtype, false},
                    bias,
                    usable_threads(threads)});
}
