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
  FT_CHECK(f.x.m >= 0, "%s: %lld rows", name, static_cast<long long>(f.x.m));
  FT_CHECK(w.group <= kMostOfGroup, "%s: a group of %lld", name, static_cast<long long>(w.group));
  FT_CHECK(f.range.groups == 1 || f.range.groups == w.groups,
           "%s: %lld ranges of x for %lld groups", name, static_cast<long long>(f.range.groups),
           static_cast<long long>(w.groups));
  const uint8_t* const zeros =
      w.zero_kind == FT_ZERO_UINT8 ? static_cast<const uint8_t*>(w.zero) : nullptr;
  for (int64_t at = 0; zeros && at < w.n * w.groups; ++at)
    FT_CHECK(zeros[at] <= 15, "%s: a zero of %d, which is no code", name, zeros[at]);
  kLevels[active_isa()]->linear(f);
  return 0;
}

}  // namespace
}  // namespace fastft

int ft_cpu_int4_linear_a8(void* y, const void* x, const uint8_t* codes, const void* scale,
                          const void* zero, const int32_t* perm, const void* bias, int64_t m,
                          int64_t n, int64_t k, int64_t group_size, int64_t x_stride_m,
                          int64_t x_stride_k, int32_t zero_kind, int32_t scale_dtype, int32_t dtype,
                          int32_t threads) {
  using namespace fastft;
  const char* name = "cpu_int4_linear_a8";
  try {
    std::vector<int32_t> position;
    Int4Weight weight;
    if (make_int4_weight(name, codes, scale, zero, perm, n, k, group_size, FT_INT4, zero_kind,
                         scale_dtype, position, weight))
      return 1;
    return run(name, {y,
                      {x, m, k, x_stride_m, x_stride_k, perm, dtype},
                      {nullptr, nullptr, 1},
                      weight,
                      bias,
                      usable_threads(threads)});
  } catch (const std::bad_alloc&) {
    return fail("%s: no memory for scratch buffers", name);
  }
}

int ft_cpu_int4_linear_a4(void* y, const void* x, const uint8_t* codes, const void* scale,
                          const uint8_t* zero, const int32_t* perm, const void* bias,
                          const float* x_scale, const float* x_zero, int64_t m, int64_t n,
                          int64_t k, int64_t group_size, int64_t x_groups, int64_t x_stride_m,
                          int64_t x_stride_k, int32_t scale_dtype, int32_t dtype, int32_t threads) {
  using namespace fastft;
  const char* name = "cpu_int4_linear_a4";
  try {
    std::vector<int32_t> position;
    Int4Weight weight;
    if (make_int4_weight(name, codes, scale, zero, perm, n, k, group_size, FT_INT4,
                         zero ? FT_ZERO_UINT8 : FT_ZERO_NONE, scale_dtype, position, weight))
      return 1;
    return run(name, {y,
                      {x, m, k, x_stride_m, x_stride_k, perm, dtype},
                      {x_scale, x_zero, x_groups},
                      weight,
                      bias,
                      usable_threads(threads)});
  } catch (const std::bad_alloc&) {
    return fail("%s: no memory for scratch buffers", name);
  }
}
