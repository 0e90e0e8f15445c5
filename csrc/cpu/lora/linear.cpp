#include "cpu/lora/linear.h"

#include <new>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/pack.h"
#include "cpu/parallel.h"
#include "fastft/status.h"

#define FT_BODY "cpu/lora/linear.inl.hpp"
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

int check_packed(const char* name, const ft_lora_layer& layer, int64_t k, int32_t dtype) {
  const int level = active_isa();
  if (layer.packed &&
      check_packed_weight(name, layer.packed, layer.packed_bytes, level, layer.n, k, dtype))
    return 1;
  return layer.packed_dx && check_packed_weight(name, layer.packed_dx, layer.packed_dx_bytes, level,
                                                k, layer.n, dtype);
}

int check_adapter(const char* name, const ft_lora_adapter& a, int64_t first_row, int64_t m,
                  const int64_t* rng) {
  FT_CHECK(a.threshold >= 0 && a.threshold <= 65536, "%s: threshold %lld is not within 65536", name,
           static_cast<long long>(a.threshold));
  FT_CHECK(!a.threshold || rng, "%s: dropout without rng", name);
  FT_CHECK(a.first_row == first_row && a.rows >= 0 && a.rows <= m - first_row,
           "%s: an adapter's rows %lld from row %lld on do not follow the %lld before, of %lld",
           name, static_cast<long long>(a.rows), static_cast<long long>(a.first_row),
           static_cast<long long>(first_row), static_cast<long long>(m));
  return 0;
}

enum class Direction { kForward, kBackward };

// `call` has the layers, x and the sizes; what is derived of them and of the adapters is filled in.
int run(const char* name, Direction direction, LoraCall call, const ft_lora_adapter* adapters,
        const int64_t* rng) {
  const bool segments = call.layer_count == 1;
  if (check_dtypes(name, call.dtype, call.adapter_dtype)) return 1;
  std::vector<LoraAdapter> made;
  try {
    made.reserve(size_t(call.adapter_count));
    int64_t rows = 0, ranks = 0;
    for (int64_t j = 0; j < call.adapter_count; ++j) {
      const ft_lora_adapter& a = adapters[j];
      const ft_lora_layer& layer = call.layers[segments ? 0 : j];
      if (check_sizes(name, call.m, layer.n, call.k, a.r) ||
          check_adapter(name, a, segments ? rows : 0, call.m, rng) ||
          check_packed(name, layer, call.k, call.dtype))
        return 1;
      const bool alone = a.rows == call.m;
      FT_CHECK(alone || segments, "%s: a projection's adapter does not have all rows", name);
      FT_CHECK(alone || layer.weight || layer.packed || layer.packed_dx,
               "%s: rows of no adapter and no base", name);
      call.copies_u |= direction == Direction::kForward ? a.gate || !alone : a.gate && a.xa;
      LoraAdapter one{a, *a.scaling, {}, call.masks_bytes, segments ? rows : ranks * call.m};
      const int64_t stream[2] = {rng ? int64_t(uint64_t(rng[0]) + uint64_t(j)) : 0,
                                 rng ? rng[1] : 0};
      one.dropout = make_dropout(rng ? stream : nullptr, uint32_t(a.threshold));
      if (one.dropout.threshold) call.masks_bytes += mask_bytes(a.rows * call.k);
      call.rank = greater(call.rank, a.r);
      rows += a.rows;
      ranks += a.r;
      made.push_back(one);
    }
    call.t_floats = call.m * (segments ? call.rank : ranks);
    call.adapters = made.data();
    const LoraKernels& kernels = *kLevels[active_isa()];
    (direction == Direction::kForward ? kernels.forward : kernels.backward)(call);
  } catch (const std::bad_alloc&) {
    return fail("%s: no memory for scratch buffers", name);
  }
  return 0;
}

LoraCall make_call(const ft_lora_layer* layers, int64_t layer_count, int64_t adapter_count,
                   void* dx, const void* x, int64_t m, int64_t k, int64_t x_stride_m,
                   int64_t x_stride_k, int32_t dtype, int32_t adapter_dtype, int32_t threads,
                   bool accumulate = false) {
  LoraCall call{};
  call.layers = layers;
  call.layer_count = layer_count;
  call.adapter_count = adapter_count;
  call.dx = dx;
  call.x = x;
  call.m = m;
  call.k = k;
  call.x_stride_m = x_stride_m;
  call.x_stride_k = x_stride_k;
  call.dtype = dtype;
  call.adapter_dtype = adapter_dtype;
  call.threads = usable_threads(threads);
  call.accumulate = accumulate;
  return call;
}

}  // namespace
}  // namespace fastft

int ft_cpu_lora_linear(void* y, void* xa, const void* x, const void* weight, const void* lora_a,
                       const void* lora_b, const void* bias, const float* scaling,
                       const int64_t* rng, const void* gate, const void* packed,
                       const void* packed_dx, int64_t m, int64_t n, int64_t k, int64_t r,
                       int64_t x_stride_m, int64_t x_stride_k, int64_t weight_stride_n,
                       int64_t weight_stride_k, int64_t gate_stride_m, int64_t packed_bytes,
                       int64_t packed_dx_bytes, uint32_t threshold, int32_t dtype,
                       int32_t adapter_dtype, int32_t accumulate, int32_t threads) {
  using namespace fastft;
  ft_lora_layer layer{};
  layer.y = y;
  layer.weight = weight;
  layer.bias = bias;
  layer.packed = packed;
  layer.packed_dx = packed_dx;
  layer.n = n;
  layer.weight_stride_n = weight_stride_n;
  layer.weight_stride_k = weight_stride_k;
  layer.packed_bytes = packed_bytes;
  layer.packed_dx_bytes = packed_dx_bytes;
  ft_lora_adapter adapter{};
  adapter.xa = xa;
  adapter.lora_a = lora_a;
  adapter.lora_b = lora_b;
  adapter.gate = gate;
  adapter.scaling = scaling;
  adapter.r = r;
  adapter.rows = m;
  adapter.gate_stride_m = gate_stride_m;
  adapter.threshold = threshold;
  return run("cpu_lora_linear", Direction::kForward,
             make_call(&layer, 1, 1, nullptr, x, m, k, x_stride_m, x_stride_k, dtype, adapter_dtype,
                       threads, accumulate != 0),
             &adapter, rng);
}

int ft_cpu_lora_linear_backward(void* dx, void* dweight, void* dlora_a, void* dlora_b, void* dbias,
                                float* dscaling, void* dgate, const void* grad, const void* x,
                                const void* weight, const void* lora_a, const void* lora_b,
                                const void* xa, const float* scaling, const int64_t* rng,
                                const void* gate, const void* packed, const void* packed_dx,
                                int64_t m, int64_t n, int64_t k, int64_t r, int64_t grad_stride_m,
                                int64_t grad_stride_n, int64_t x_stride_m, int64_t x_stride_k,
                                int64_t weight_stride_n, int64_t weight_stride_k,
                                int64_t gate_stride_m, int64_t packed_bytes,
                                int64_t packed_dx_bytes, uint32_t threshold, int32_t dtype,
                                int32_t adapter_dtype, int32_t accumulate, int32_t threads) {
  using namespace fastft;
  ft_lora_layer layer{};
  layer.dweight = dweight;
  layer.dbias = dbias;
  layer.grad = grad;
  layer.weight = weight;
  layer.packed = packed;
  layer.packed_dx = packed_dx;
  layer.n = n;
  layer.grad_stride_m = grad_stride_m;
  layer.grad_stride_n = grad_stride_n;
  layer.weight_stride_n = weight_stride_n;
  layer.weight_stride_k = weight_stride_k;
  layer.packed_bytes = packed_bytes;
  layer.packed_dx_bytes = packed_dx_bytes;
  ft_lora_adapter adapter{};
  adapter.xa = const_cast<void*>(xa);
  adapter.dlora_a = dlora_a;
  adapter.dlora_b = dlora_b;
  adapter.dgate = dgate;
  adapter.dscaling = dscaling;
  adapter.lora_a = lora_a;
  adapter.lora_b = lora_b;
  adapter.gate = gate;
  adapter.scaling = scaling;
  adapter.r = r;
  adapter.rows = m;
  adapter.gate_stride_m = gate_stride_m;
  adapter.threshold = threshold;
  return run("cpu_lora_linear_backward", Direction::kBackward,
             make_call(&layer, 1, 1, dx, x, m, k, x_stride_m, x_stride_k, dtype, adapter_dtype,
                       threads, accumulate != 0),
             &adapter, rng);
}

int ft_cpu_lora_projections(const ft_lora_layer* layers, const ft_lora_adapter* adapters,
                            const void* x, const int64_t* rng, int64_t count, int64_t m, int64_t k,
                            int64_t x_stride_m, int64_t x_stride_k, int32_t dtype,
                            int32_t adapter_dtype, int32_t threads) {
  using namespace fastft;
  return run("cpu_lora_projections", Direction::kForward,
             make_call(layers, count, count, nullptr, x, m, k, x_stride_m, x_stride_k, dtype,
                       adapter_dtype, threads),
             adapters, rng);
}

int ft_cpu_lora_projections_backward(void* dx, const ft_lora_layer* layers,
                                     const ft_lora_adapter* adapters, const void* x,
                                     const int64_t* rng, int64_t count, int64_t m, int64_t k,
                                     int64_t x_stride_m, int64_t x_stride_k, int32_t dtype,
                                     int32_t adapter_dtype, int32_t threads) {
  using namespace fastft;
  const char* name = "cpu_lora_projections_backward";
  FT_CHECK(count <= kMaxProjections, "%s: %lld projections are more than %lld", name,
           static_cast<long long>(count), static_cast<long long>(kMaxProjections));
  return run(name, Direction::kBackward,
             make_call(layers, count, count, dx, x, m, k, x_stride_m, x_stride_k, dtype,
                       adapter_dtype, threads),
             adapters, rng);
}

int ft_cpu_lora_adapters(const ft_lora_layer* layer, const ft_lora_adapter* adapters, const void* x,
                         const int64_t* rng, int64_t count, int64_t m, int64_t k,
                         int64_t x_stride_m, int64_t x_stride_k, int32_t dtype,
                         int32_t adapter_dtype, int32_t threads) {
  using namespace fastft;
  return run("cpu_lora_adapters", Direction::kForward,
             make_call(layer, 1, count, nullptr, x, m, k, x_stride_m, x_stride_k, dtype,
                       adapter_dtype, threads),
             adapters, rng);
}

int ft_cpu_lora_adapters_backward(void* dx, const ft_lora_layer* layer,
                                  const ft_lora_adapter* adapters, const void* x,
                                  const int64_t* rng, int64_t count, int64_t m, int64_t k,
                                  int64_t x_stride_m, int64_t x_stride_k, int32_t dtype,
                                  int32_t adapter_dtype, int32_t threads) {
  using namespace fastft;
  return run("cpu_lora_adapters_backward", Direction::kBackward,
             make_call(layer, 1, count, dx, x, m, k, x_stride_m, x_stride_k, dtype, adapter_dtype,
                       threads),
             adapters, rng);
}
