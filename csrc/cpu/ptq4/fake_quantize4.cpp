#include "cpu/ptq4/fake_quantize4.h"

#include <new>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/ptq4/weight.h"
#include "fastft/api.h"
#include "fastft/status.h"

#define FT_BODY "cpu/ptq4/fake_quantize4.inl.hpp"
#include "cpu/isa.h"

namespace fastft {
namespace {

// By ft_isa.
constexpr const FakeQuantize4Kernels* kLevels[] = {
    &scalar::kFakeQuantize4,
#if defined(__x86_64__)
    &avx2::kFakeQuantize4,
    &avx512::kFakeQuantize4,
    &avx512_bf16::kFakeQuantize4,
#endif
};

int run(const char* name, void (*FakeQuantize4Kernels::*kernel)(const FakeQuantize4&),
        FakeQuantize4 f) {
  FT_CHECK(f.x.dtype >= FT_FLOAT32 && f.x.dtype <= FT_FLOAT16, "%s: unknown dtype code %d", name,
           f.x.dtype);
  FT_CHECK(f.x.m >= 0 && f.x.k >= 0 && f.group_size > 0, "%s: sizes m %lld, k %lld, group %lld",
           name, static_cast<long long>(f.x.m), static_cast<long long>(f.x.k),
           static_cast<long long>(f.group_size));
  f.group_size = greater(1, lesser(f.group_size, f.x.k));
  FT_CHECK(f.range.groups == 1 || f.range.groups == ceil_div(f.x.k, f.group_size),
           "%s: %lld ranges of groups of %lld of %lld", name,
           static_cast<long long>(f.range.groups), static_cast<long long>(f.group_size),
           static_cast<long long>(f.x.k));
  try {
    std::vector<int32_t> position;
    if (f.x.perm && invert_perm(name, f.x.perm, f.x.k, position)) return 1;
    (kLevels[active_isa()]->*kernel)(f);
  } catch (const std::bad_alloc&) {
    return fail("%s: no memory for scratch buffers", name);
  }
  return 0;
}

}  // namespace
}  // namespace fastft

int ft_cpu_fake_quantize4(void* y, const void* x, const float* x_scale, const float* x_zero,
                          const int32_t* perm, int64_t m, int64_t k, int64_t group_size,
                          int64_t x_groups, int64_t x_stride_m, int64_t x_stride_k, int32_t dtype,
                          int32_t threads) {
  using namespace fastft;
  return run("cpu_fake_quantize4", &FakeQuantize4Kernels::forward,
             {y,
              nullptr,
              nullptr,
              {x, m, k, x_stride_m, x_stride_k, perm, dtype},
              {},
              {x_scale, x_zero, x_groups},
              group_size,
              usable_threads(threads)});
}

int ft_cpu_fake_quantize4_backward(void* dx, float* dscale, float* dzero, const void* grad,
                                   const void* x, const float* x_scale, const float* x_zero,
                                   const int32_t* perm, int64_t m, int64_t k, int64_t group_size,
                                   int64_t x_groups, int64_t grad_stride_m, int64_t grad_stride_k,
                                   int64_t x_stride_m, int64_t x_stride_k, int32_t dtype,
                                   int32_t threads) {
  using namespace fastft;
  return run("cpu_fake_quantize4_backward", &FakeQuantize4Kernels::backward,
             {dx,
              dscale,
              dzero,
              {x, m, k, x_stride_m, x_stride_k, perm, dtype},
              {grad, m, k, grad_stride_m, grad_stride_k, perm, dtype},
              {x_scale, x_zero, x_groups},
              group_size,
              usable_threads(threads)});
}
