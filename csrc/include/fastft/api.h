// The C ABI: one function per op and device. This header is the specification of the kernels.
//
// Every function returns 0, or 1 with a message in ft_last_error(). The Python contract has
// checked shapes and dtypes; what fails here is a bug in an adapter. Outputs come first. Matrices
// are C-contiguous unless strides are given, in elements. A null output is not computed.
// dtype is that of the base (x, weight, bias, y, grad and their gradients), adapter_dtype that of
// the adapter (lora_a, lora_b, xa and their gradients): the same, or float32 beside a half dtype.
#pragma once
#include <cstdint>

#if defined(_WIN32)
#define FT_API extern "C" __declspec(dllexport)
#else
#define FT_API extern "C" __attribute__((visibility("default")))
#endif

FT_API const char* ft_last_error();

// ---- the library on this machine -----------------------------------------------------------

// Levels of the CPU's instruction set, each including those before it.
enum ft_isa : int32_t { FT_SCALAR = 0, FT_AVX2 = 1, FT_AVX512 = 2, FT_AVX512_BF16 = 3 };

// [out] detected: the highest level this CPU and operating system run, of those compiled in.
// [out] active: the level in use, at most `detected`.
FT_API int ft_cpu_isa(int32_t* detected, int32_t* active);
// Use at most this level from the next call on. PYFASTFT_CPU_ISA sets the first value.
FT_API int ft_cpu_set_isa(int32_t level);

// ---- the GEMM core -------------------------------------------------------------------------

// c = a b^T, accumulated in float32. [out] c (m, n); [in] a (m, k), and either b (n, k) with its
// strides, or packed_b: ft_cpu_pack_weight's of b (n, k) or, if packed_transposed, of b^T (k, n);
// the other is null. The result has the same bits. threads: at most this many.
FT_API int ft_cpu_matmul(void* c, const void* a, const void* b, const void* packed_b,
                         int64_t packed_b_bytes, int64_t m, int64_t n, int64_t k,
                         int64_t a_stride_m, int64_t a_stride_k, int64_t b_stride_n,
                         int64_t b_stride_k, int32_t packed_transposed, int32_t dtype,
                         int32_t threads);

// Packed weights: a weight (n, k) in the order in which the core reads the columns of a product
// over k, behind a header of 64 bytes (csrc/cpu/pack.h). The values are the weight's own; lines are
// filled up to a multiple of 16, 8 or 4. It serves the level of the instruction set at which it was
// packed. Every function that takes one fails, before it reads a value, where header or size are
// not those of the weight expected.

// [out] bytes: the size of the packed form at the level in use.
FT_API int ft_cpu_pack_weight_bytes(int64_t* bytes, int64_t n, int64_t k, int32_t dtype);
// [out] packed: so many bytes, at an address that is a multiple of 8; [in] weight (n, k).
FT_API int ft_cpu_pack_weight(void* packed, const void* weight, int64_t packed_bytes, int64_t n,
                              int64_t k, int64_t stride_n, int64_t stride_k, int32_t dtype,
                              int32_t threads);
// [out] weight (n, k), bit for bit what was packed.
FT_API int ft_cpu_unpack_weight(void* weight, const void* packed, int64_t packed_bytes, int64_t n,
                                int64_t k, int32_t dtype, int32_t threads);

// ---- lora ----------------------------------------------------------------------------------

// y = x W^T + b + s * xa B^T with xa = dropout(x) A^T, accumulated in float32.
// [out] y (m, n), xa (m, r); [in] x (m, k), weight (n, k), lora_a (r, k), lora_b (n, r),
// bias (n) or null, scaling: one float, rng: int64 (seed, offset) or null, threshold: of 65536,
// see philox.h. threads: at most this many.
FT_API int ft_cpu_lora_linear(void* y, void* xa, const void* x, const void* weight,
                              const void* lora_a, const void* lora_b, const void* bias,
                              const float* scaling, const int64_t* rng, int64_t m, int64_t n,
                              int64_t k, int64_t r, int64_t x_stride_m, int64_t x_stride_k,
                              int64_t weight_stride_n, int64_t weight_stride_k, uint32_t threshold,
                              int32_t dtype, int32_t adapter_dtype, int32_t threads);

// With T = grad B: dx = grad W + s * dropout(T A), dweight = grad^T x, dbias = sum_m grad,
// dlora_a = s * T^T dropout(x), dlora_b = s * grad^T xa, dscaling = sum(T * xa). T stays float32.
// [in] x is read for dweight and dlora_a, xa for dlora_b and dscaling; null where not read.
FT_API int ft_cpu_lora_linear_backward(
    void* dx, void* dweight, void* dlora_a, void* dlora_b, void* dbias, float* dscaling,
    const void* grad, const void* x, const void* weight, const void* lora_a, const void* lora_b,
    const void* xa, const float* scaling, const int64_t* rng, int64_t m, int64_t n, int64_t k,
    int64_t r, int64_t grad_stride_m, int64_t grad_stride_n, int64_t x_stride_m, int64_t x_stride_k,
    int64_t weight_stride_n, int64_t weight_stride_k, uint32_t threshold, int32_t dtype,
    int32_t adapter_dtype, int32_t threads);

// The five stages around torch's GEMM on a GPU; scaling, rng and workspaces are device pointers.
// x and grad have a row stride and unit column stride. All reductions have a fixed order.

// xa = dropout(x) A^T. [out] xa (m, r).
FT_API int ft_cuda_lora_down(void* xa, const void* x, const void* lora_a, const int64_t* rng,
                             int64_t m, int64_t k, int64_t r, int64_t x_stride_m,
                             uint32_t threshold, int32_t dtype, int32_t adapter_dtype,
                             void* stream);

// y += s * xa B^T. [in, out] y (m, n).
FT_API int ft_cuda_lora_up(void* y, const void* xa, const void* lora_b, const float* scaling,
                           int64_t m, int64_t n, int64_t r, int32_t dtype, int32_t adapter_dtype,
                           void* stream);

// One pass over grad: t = grad B in float32, dlora_b = s * grad^T xa, dscaling = sum(t * xa).
// [out] t (m, r) float, dlora_b (n, r) or null, dscaling (1) float or null;
// [work] workspace: workspace_floats floats, as ft_cuda_lora_up_grad_workspace says.
FT_API int ft_cuda_lora_up_grad(float* t, void* dlora_b, float* dscaling, float* workspace,
                                const void* grad, const void* xa, const void* lora_b,
                                const float* scaling, int64_t workspace_floats, int64_t m,
                                int64_t n, int64_t r, int64_t grad_stride_m, int32_t dtype,
                                int32_t adapter_dtype, void* stream);
FT_API int ft_cuda_lora_up_grad_workspace(int64_t* floats, int64_t m, int64_t n, int64_t r);

// dlora_a = s * t^T dropout(x), the mask regenerated. [out] dlora_a (r, k).
FT_API int ft_cuda_lora_down_grad(void* dlora_a, float* workspace, const float* t, const void* x,
                                  const float* scaling, const int64_t* rng,
                                  int64_t workspace_floats, int64_t m, int64_t k, int64_t r,
                                  int64_t x_stride_m, uint32_t threshold, int32_t dtype,
                                  int32_t adapter_dtype, void* stream);
FT_API int ft_cuda_lora_down_grad_workspace(int64_t* floats, int64_t m, int64_t k, int64_t r);

// dx += s * dropout(t A), the mask regenerated. [in, out] dx (m, k).
FT_API int ft_cuda_lora_dx(void* dx, const float* t, const void* lora_a, const float* scaling,
                           const int64_t* rng, int64_t m, int64_t k, int64_t r, uint32_t threshold,
                           int32_t dtype, int32_t adapter_dtype, void* stream);
