// What the two linear kernels of the ptq4 family share: their operands, and how parts of K that
// several blocks have added up become the output.
#pragma once
#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/quant.cuh"
#include "fastft/dtype.h"

namespace fastft {

// y (m, n) = x W^T + bias. x has a row stride and unit column stride. Where K is cut into `splits`
// parts, their float32 sums lie in partials (splits, m, n).
template <class T>
struct Int4Linear {
  T* y;
  float* partials;
  const T* x;
  const T* bias;  // (n) or null
  QuantizedMatrix w;
  int64_t m, x_stride_m, splits;
  bool aligned;  // rows of x and of codes begin at 16 bytes
};

// Write one sum where it belongs. `split` is its part of K.
template <class T>
__device__ __forceinline__ void store_sum(const Int4Linear<T>& p, int64_t split, int64_t row_of_x,
                                          int64_t row_of_w, float sum) {
  const int64_t place = row_of_x * p.w.n + row_of_w;
  if (p.splits > 1)
    p.partials[split * p.m * p.w.n + place] = sum;
  else
    p.y[place] = from_float<T>(p.bias ? sum + to_float(p.bias[row_of_w]) : sum);
}

// y = the sums of the parts, first to last, and the bias.
template <class T>
__global__ __launch_bounds__(kThreads) void int4_add_partials(Int4Linear<T> p) {
  const int64_t size = p.m * p.w.n;
  const int64_t place = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (place >= size) return;
  float sum = 0.0f;
  for (int64_t split = 0; split < p.splits; ++split) sum += p.partials[split * size + place];
  // In 32 bits: there are at most 64 rows.
  if (p.bias) sum += to_float(p.bias[uint32_t(place) % uint32_t(p.w.n)]);
  p.y[place] = from_float<T>(sum);
}

template <class T>
int launch_add_partials(const char* op, void* stream, const Int4Linear<T>& p) {
  if (p.splits == 1) return 0;
  return launch(op, stream, ceil_div<int64_t>(p.m * p.w.n, kThreads), int4_add_partials<T>, p);
}

// The operands as the ABI has them, checked as far as memory is concerned.
template <class T>
int make_int4_linear(const char* op, Int4Linear<T>& p, void* y, float* partials, const void* x,
                     const void* bias, const QuantizedMatrix& w, int64_t partials_floats, int64_t m,
                     int64_t x_stride_m, int64_t splits) {
  FT_CHECK(w.group_size > 0 && splits > 0, "%s: no group size or no split", op);
  const int64_t needed = splits > 1 ? splits * m * w.n : 0;
  FT_CHECK(partials_floats >= needed, "%s: room for %lld partial sums, %lld needed", op,
           static_cast<long long>(partials_floats), static_cast<long long>(needed));
  const auto at_16 = [](const void* data, int64_t pitch) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && pitch % 16 == 0;
  };
  const bool aligned = at_16(x, x_stride_m * int64_t(sizeof(T))) && at_16(w.codes, code_bytes(w.k));
  p = {static_cast<T*>(y),
       partials,
       static_cast<const T*>(x),
       static_cast<const T*>(bias),
       w,
       m,
       x_stride_m,
       splits,
       aligned};
  return 0;
}

// Kernels divide by the size of a group in 32 bits, so one that is larger than K becomes K.
inline QuantizedMatrix quantized_matrix(const uint8_t* codes, const void* scale, const void* zero,
                                        const float* table, int64_t n, int64_t k,
                                        int64_t group_size, int32_t scale_dtype,
                                        int32_t zero_kind) {
  const int64_t size = group_size < k ? group_size : k;
  const int64_t groups = size > 0 ? ceil_div(k, size) : 0;
  return {codes, scale, zero, table, n, k, groups, size, scale_dtype, zero_kind};
}

}  // namespace fastft
