#include "cpu/ptq4/quantize_weight.h"

#include <new>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "fastft/api.h"
#include "fastft/status.h"

#define FT_BODY "cpu/ptq4/quantize_weight.inl.hpp"
#include "cpu/isa.h"

namespace fastft {
namespace {

// By ft_isa.
constexpr const QuantizeKernels* kLevels[] = {
    &scalar::kQuantize,
#if defined(__x86_64__)
    &avx2::kQuantize,
    &avx512::kQuantize,
    &avx512_bf16::kQuantize,
#endif
};

int run(const char* name, void (*QuantizeKernels::*kernel)(const Quantize&), const Quantize& call) {
  FT_CHECK(call.dtype >= FT_FLOAT32 && call.dtype <= FT_FLOAT16, "%s: unknown dtype code %d", name,
           call.dtype);
  FT_CHECK(call.scale_dtype >= FT_FLOAT32 && call.scale_dtype <= FT_FLOAT16,
           "%s: unknown dtype code %d", name, call.scale_dtype);
  FT_CHECK(call.n >= 0 && call.k >= 0, "%s: %lld and %lld are not sizes", name,
           static_cast<long long>(call.n), static_cast<long long>(call.k));
  FT_CHECK(call.group_size > 0, "%s: %lld is no group size", name,
           static_cast<long long>(call.group_size));
  FT_CHECK(call.grid > 0 && call.iterations >= 0, "%s: %d candidates and %d iterations", name,
           call.grid, call.iterations);
  try {
    (kLevels[active_isa()]->*kernel)(call);
  } catch (const std::bad_alloc&) {
    return fail("%s: no memory for scratch buffers", name);
  }
  return 0;
}

}  // namespace
}  // namespace fastft

int ft_cpu_rtn_quantize(uint8_t* codes, void* scale, uint8_t* zero, const void* weight,
                        const float* table, int64_t n, int64_t k, int64_t group_size,
                        int64_t weight_stride_n, int32_t symmetric, int32_t grid, int32_t dtype,
                        int32_t scale_dtype, int32_t threads) {
  using namespace fastft;
  Quantize call{};
  call.codes = codes, call.scale = scale, call.zero = zero, call.weight = weight;
  call.table = table, call.n = n, call.k = k, call.group_size = group_size;
  call.weight_stride_n = weight_stride_n, call.symmetric = symmetric != 0, call.grid = grid;
  call.dtype = dtype, call.scale_dtype = scale_dtype, call.threads = usable_threads(threads);
  return run("cpu_rtn_quantize", &QuantizeKernels::rtn_quantize, call);
}

int ft_cpu_hqq_quantize(uint8_t* codes, void* scale, void* zero, const void* weight,
                        const float* options, int64_t n, int64_t k, int64_t group_size,
                        int64_t weight_stride_n, int32_t round_zero, int32_t iterations,
                        int32_t dtype, int32_t scale_dtype, int32_t threads) {
  using namespace fastft;
  Quantize call{};
  call.codes = codes, call.scale = scale, call.zero = zero, call.weight = weight;
  call.n = n, call.k = k, call.group_size = group_size, call.weight_stride_n = weight_stride_n;
  call.grid = 1, call.round_zero = round_zero != 0, call.iterations = iterations;
  call.power = options[0], call.beta = options[1], call.kappa = options[2];
  call.dtype = dtype, call.scale_dtype = scale_dtype, call.threads = usable_threads(threads);
  return run("cpu_hqq_quantize", &QuantizeKernels::hqq_quantize, call);
}
