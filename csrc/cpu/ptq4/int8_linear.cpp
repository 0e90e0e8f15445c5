#include "cpu/ptq4/int8_linear.h"

#include <new>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "fastft/api.h"
#include "fastft/status.h"

#define FT_BODY "cpu/ptq4/int8_linear.inl.hpp"
#include "cpu/isa.h"

namespace fastft {
namespace {

// By ft_isa.
constexpr const Int8LinearKernels* kLevels[] = {
    &scalar::kInt8Linear,
#if defined(__x86_64__)
    &avx2::kInt8Linear,
    &avx512::kInt8Linear,
    &avx512_bf16::kInt8Linear,
#endif
};

int run(const char* name, void (*Int8LinearKernels::*kernel)(const Int8Linear&),
        const Int8Linear& f) {
  FT_CHECK(f.dtype >= FT_FLOAT32 && f.dtype <= FT_FLOAT16, "%s: unknown dtype code %d", name,
           f.dtype);
  FT_CHECK(f.m >= 0 && f.n >= 0 && f.k >= 0, "%s: m %lld, n %lld and k %lld are not sizes", name,
           static_cast<long long>(f.m), static_cast<long long>(f.n), static_cast<long long>(f.k));
  try {
    (kLevels[active_isa()]->*kernel)(f);
  } catch (const std::bad_alloc&) {
    return fail("%s: no memory for scratch buffers", name);
  }
  return 0;
}

}  // namespace
}  // namespace fastft

int ft_cpu_int8_linear(void* y, const void* x, const int8_t* codes, const float* scale,
                       const void* bias, int64_t m, int64_t n, int64_t k, int64_t x_stride_m,
                       int64_t x_stride_k, int64_t codes_stride_n, int64_t codes_stride_k,
                       int32_t dtype, int32_t threads) {
  using namespace fastft;
  return run("cpu_int8_linear", &Int8LinearKernels::forward,
             {y,
              bias,
              nullptr,
              nullptr,
              nullptr,
              nullptr,
              0,
              0,
              x,
              codes,
              scale,
              m,
              n,
              k,
              x_stride_m,
              x_stride_k,
              codes_stride_n,
              codes_stride_k,
              dtype,
              usable_threads(threads)});
}

int ft_cpu_int8_linear_backward(void* dx, float* dscale, void* dbias, const void* grad,
                                const void* x, const int8_t* codes, const float* scale, int64_t m,
                                int64_t n, int64_t k, int64_t grad_stride_m, int64_t grad_stride_n,
                                int64_t x_stride_m, int64_t x_stride_k, int64_t codes_stride_n,
                                int64_t codes_stride_k, int32_t dtype, int32_t threads) {
  using namespace fastft;
  return run("cpu_int8_linear_backward", &Int8LinearKernels::backward,
             {nullptr,
              nullptr,
              dx,
              dscale,
              dbias,
              grad,
              grad_stride_m,
              grad_stride_n,
              x,
              codes,
              scale,
              m,
              n,
              k,
              x_stride_m,
              x_stride_k,
              codes_stride_n,
              codes_stride_k,
              dtype,
              usable_threads(threads)});
}
