#include "cpu/ptq4/linear.h"

#include <new>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "fastft/status.h"

#define FT_BODY "cpu/ptq4/linear.inl.hpp"
#include "cpu/isa.h"

namespace fastft {
namespace {

// By ft_isa.
constexpr const Int4Kernels* kLevels[] = {
    &scalar::kInt4,
#if defined(__x86_64__)
    &avx2::kInt4,
    &avx512::kInt4,
    &avx512_bf16::kInt4,
#endif
};

int check_call(const char* name, int64_t m, int32_t dtype) {
  FT_CHECK(dtype >= FT_FLOAT32 && dtype <= FT_FLOAT16, "%s: unknown dtype code %d", name, dtype);
  FT_CHECK(m >= 0, "%s: m %lld is no size", name, static_cast<long long>(m));
  return 0;
}

// call(kernels) with what it throws as a failing status.
template <class Call>
int run(const char* name, const Call& call) {
  try {
    return call(*kLevels[active_isa()]);
  } catch (const std::bad_alloc&) {
    return fail("%s: no memory for scratch buffers", name);
  }
}

// One adapter on all rows, beside a base that the layer does not have.
int make_lora_call(const char* name, const Int4Call& base, const ft_lora_layer& layer,
                   const ft_lora_adapter& a, const int64_t* rng, int32_t adapter_dtype,
                   LoraAdapter& adapter, LoraCall& call) {
  FT_CHECK(adapter_dtype == base.dtype || adapter_dtype == FT_FLOAT32,
           "%s: adapter dtype code %d beside base dtype code %d", name, adapter_dtype, base.dtype);
  FT_CHECK(a.r >= 1, "%s: rank %lld", name, static_cast<long long>(a.r));
  FT_CHECK(a.threshold >= 0 && a.threshold <= 65536, "%s: threshold %lld is not within 65536", name,
           static_cast<long long>(a.threshold));
  FT_CHECK(!a.threshold || rng, "%s: dropout without rng", name);
  adapter = {a, *a.scaling, make_dropout(rng, uint32_t(a.threshold)), 0, 0};
  call.layers = &layer;
  call.adapters = &adapter;
  call.layer_count = call.adapter_count = 1;
  call.dx = base.dx;
  call.x = base.x;
  call.m = base.m;
  call.k = base.w.k;
  call.x_stride_m = base.x_stride_m;
  call.x_stride_k = base.x_stride_k;
  call.rank = a.r;
  call.masks_bytes = adapter.dropout.threshold ? mask_bytes(base.m * base.w.k) : 0;
  call.t_floats = base.m * a.r;
  call.dtype = base.dtype;
  call.adapter_dtype = adapter_dtype;
  call.threads = base.threads;
  return 0;
}

}  // namespace
}  // namespace fastft

int ft_cpu_int4_dequantize(void* weight, const uint8_t* codes, const void* scale, const void* zero,
                           const int32_t* perm, int64_t n, int64_t k, int64_t group_size,
                           int32_t codebook, int32_t zero_kind, int32_t scale_dtype, int32_t dtype,
                           int32_t threads) {
  using namespace fastft;
  const char* name = "cpu_int4_dequantize";
  return run(name, [&](const Int4Kernels& kernels) {
    std::vector<int32_t> position;
    Int4Dequantize call{weight, {}, dtype, usable_threads(threads)};
    if (check_call(name, 0, dtype) ||
        make_int4_weight(name, codes, scale, zero, perm, n, k, group_size, codebook, zero_kind,
                         scale_dtype, position, call.w))
      return 1;
    kernels.dequantize(call);
    return 0;
  });
}

int ft_cpu_int4_linear(void* y, const void* x, const uint8_t* codes, const void* scale,
                       const void* zero, const void* bias, const int32_t* perm, int64_t m,
                       int64_t n, int64_t k, int64_t group_size, int64_t x_stride_m,
                       int64_t x_stride_k, int32_t codebook, int32_t zero_kind, int32_t scale_dtype,
                       int32_t dtype, int32_t threads) {
  using namespace fastft;
  const char* name = "cpu_int4_linear";
  return run(name, [&](const Int4Kernels& kernels) {
    std::vector<int32_t> position;
    Int4Call call{};
    if (check_call(name, m, dtype) ||
        make_int4_weight(name, codes, scale, zero, perm, n, k, group_size, codebook, zero_kind,
                         scale_dtype, position, call.w))
      return 1;
    call.y = y;
    call.x = x;
    call.bias = bias;
    call.m = m;
    call.x_stride_m = x_stride_m;
    call.x_stride_k = x_stride_k;
    call.dtype = dtype;
    call.threads = usable_threads(threads);
    kernels.forward(call);
    return 0;
  });
}

int ft_cpu_int4_linear_backward(void* dx, void* dscale, void* dzero, void* dbias, const void* grad,
                                const void* x, const uint8_t* codes, const void* scale,
                                const void* zero, const int32_t* perm, int64_t m, int64_t n,
                                int64_t k, int64_t group_size, int64_t grad_stride_m,
                                int64_t grad_stride_n, int64_t x_stride_m, int64_t x_stride_k,
                                int32_t codebook, int32_t zero_kind, int32_t scale_dtype,
                                int32_t dtype, int32_t threads) {
  using namespace fastft;
  const char* name = "cpu_int4_linear_backward";
  return run(name, [&](const Int4Kernels& kernels) {
    std::vector<int32_t> position;
    Int4Call call{};
    if (check_call(name, m, dtype) ||
        make_int4_weight(name, codes, scale, zero, perm, n, k, group_size, codebook, zero_kind,
                         scale_dtype, position, call.w))
      return 1;
    call.dx = dx;
    call.dscale = dscale;
    call.dzero = dzero;
    call.dbias = dbias;
    call.grad = grad;
    call.x = x;
    call.m = m;
    call.grad_stride_m = grad_stride_m;
    call.grad_stride_n = grad_stride_n;
    call.x_stride_m = x_stride_m;
    call.x_stride_k = x_stride_k;
    call.dtype = dtype;
    call.threads = usable_threads(threads);
    kernels.backward(call);
    return 0;
  });
}

int ft_cpu_int4_lora_linear(void* y, void* xa, const void* x, const uint8_t* codes,
                            const void* scale, const void* zero, const void* lora_a,
                            const void* lora_b, const void* bias, const float* scaling,
                            const int64_t* rng, const int32_t* perm, int64_t m, int64_t n,
                            int64_t k, int64_t r, int64_t group_size, int64_t x_stride_m,
                            int64_t x_stride_k, uint32_t threshold, int32_t codebook,
                            int32_t zero_kind, int32_t scale_dtype, int32_t dtype,
                            int32_t adapter_dtype, int32_t threads) {
  using namespace fastft;
  const char* name = "cpu_int4_lora_linear";
  return run(name, [&](const Int4Kernels& kernels) {
    std::vector<int32_t> position;
    Int4Call base{};
    if (check_call(name, m, dtype) ||
        make_int4_weight(name, codes, scale, zero, perm, n, k, group_size, codebook, zero_kind,
                         scale_dtype, position, base.w))
      return 1;
    base.x = x;
    base.m = m;
    base.x_stride_m = x_stride_m;
    base.x_stride_k = x_stride_k;
    base.dtype = dtype;
    base.threads = usable_threads(threads);
    ft_lora_layer layer{};
    layer.y = y;
    layer.bias = bias;
    layer.n = n;
    ft_lora_adapter a{};
    a.xa = xa;
    a.lora_a = lora_a;
    a.lora_b = lora_b;
    a.scaling = scaling;
    a.r = r;
    a.rows = m;
    a.threshold = threshold;
    LoraAdapter adapter;
    LoraCall call{};
    if (make_lora_call(name, base, layer, a, rng, adapter_dtype, adapter, call)) return 1;
    kernels.lora_forward(base, call);
    return 0;
  });
}

int ft_cpu_int4_lora_linear_backward(
    void* dx, void* dscale, void* dzero, void* dlora_a, void* dlora_b, void* dbias, float* dscaling,
    const void* grad, const void* x, const uint8_t* codes, const void* scale, const void* zero,
    const void* lora_a, const void* lora_b, const void* xa, const float* scaling,
    const int64_t* rng, const int32_t* perm, int64_t m, int64_t n, int64_t k, int64_t r,
    int64_t group_size, int64_t grad_stride_m, int64_t grad_stride_n, int64_t x_stride_m,
    int64_t x_stride_k, uint32_t threshold, int32_t codebook, int32_t zero_kind,
    int32_t scale_dtype, int32_t dtype, int32_t adapter_dtype, int32_t threads) {
  using namespace fastft;
  const char* name = "cpu_int4_lora_linear_backward";
  return run(name, [&](const Int4Kernels& kernels) {
    std::vector<int32_t> position;
    Int4Call base{};
    if (check_call(name, m, dtype) ||
        make_int4_weight(name, codes, scale, zero, perm, n, k, group_size, codebook, zero_kind,
                         scale_dtype, position, base.w))
      return 1;
    base.dx = dx;
    base.dscale = dscale;
    base.dzero = dzero;
    base.grad = grad;
    base.x = x;
    base.m = m;
    base.grad_stride_m = grad_stride_m;
    base.grad_stride_n = grad_stride_n;
    base.x_stride_m = x_stride_m;
    base.x_stride_k = x_stride_k;
    base.dtype = dtype;
    base.threads = usable_threads(threads);
    ft_lora_layer layer{};
    layer.dbias = dbias;
    layer.grad = grad;
    layer.n = n;
    layer.grad_stride_m = grad_stride_m;
    layer.grad_stride_n = grad_stride_n;
    ft_lora_adapter a{};
    a.xa = const_cast<void*>(xa);
    a.dlora_a = dlora_a;
    a.dlora_b = dlora_b;
    a.dscaling = dscaling;
    a.lora_a = lora_a;
    a.lora_b = lora_b;
    a.scaling = scaling;
    a.r = r;
    a.rows = m;
    a.threshold = threshold;
    LoraAdapter adapter;
    LoraCall call{};
    if (make_lora_call(name, base, layer, a, rng, adapter_dtype, adapter, call)) return 1;
    kernels.lora_backward(base, call);
    return 0;
  });
}
