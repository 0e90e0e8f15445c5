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

// With xa = dropout(x) A^T and a gate g, 1 where it is null, accumulated in float32:
// y = x W^T + b + s * (xa * g) B^T. xa * g is rounded to the adapter's dtype.
// [out] y (m, n), xa (m, r); [in] x (m, k), weight (n, k) or null, lora_a (r, k), lora_b (n, r),
// bias (n) or null, scaling: one float, rng: int64 (seed, offset) or null, threshold: of 65536,
// see philox.h; gate (m, r), or with gate_stride_m 0 (r); packed: ft_cpu_pack_weight's of the
// weight, packed_dx: of its transpose, or null. One of the three is read; where all are null there
// is no base product. accumulate: y holds what is added to. threads: at most this many.
FT_API int ft_cpu_lora_linear(void* y, void* xa, const void* x, const void* weight,
                              const void* lora_a, const void* lora_b, const void* bias,
                              const float* scaling, const int64_t* rng, const void* gate,
                              const void* packed, const void* packed_dx, int64_t m, int64_t n,
                              int64_t k, int64_t r, int64_t x_stride_m, int64_t x_stride_k,
                              int64_t weight_stride_n, int64_t weight_stride_k,
                              int64_t gate_stride_m, int64_t packed_bytes, int64_t packed_dx_bytes,
                              uint32_t threshold, int32_t dtype, int32_t adapter_dtype,
                              int32_t accumulate, int32_t threads);

// With T = grad B: dx = grad W + s * dropout((T * g) A), dweight = grad^T x, dbias = sum_m grad,
// dlora_a = s * (T * g)^T dropout(x), dlora_b = s * grad^T (xa * g), dscaling = sum(T * xa * g),
// dgate = s * T * xa, over the rows where the gate has none. T stays float32.
// [in] x is read for dweight and dlora_a, xa for dlora_b, dscaling and dgate; null where not read.
// accumulate: dx holds what is added to.
FT_API int ft_cpu_lora_linear_backward(
    void* dx, void* dweight, void* dlora_a, void* dlora_b, void* dbias, float* dscaling,
    void* dgate, const void* grad, const void* x, const void* weight, const void* lora_a,
    const void* lora_b, const void* xa, const float* scaling, const int64_t* rng, const void* gate,
    const void* packed, const void* packed_dx, int64_t m, int64_t n, int64_t k, int64_t r,
    int64_t grad_stride_m, int64_t grad_stride_n, int64_t x_stride_m, int64_t x_stride_k,
    int64_t weight_stride_n, int64_t weight_stride_k, int64_t gate_stride_m, int64_t packed_bytes,
    int64_t packed_dx_bytes, uint32_t threshold, int32_t dtype, int32_t adapter_dtype,
    int32_t accumulate, int32_t threads);

// A base layer among several, in both directions; each field as the parameter of that name above.
// Python writes these structs as arrays of 64-bit integers.
struct ft_lora_layer {
  void *y, *dweight, *dbias;
  const void *grad, *weight, *bias, *packed, *packed_dx;
  int64_t n, grad_stride_m, grad_stride_n, weight_stride_n, weight_stride_k, packed_bytes,
      packed_dx_bytes;
};

// An adapter among several, and the rows of x that it serves. xa is read by the backward.
struct ft_lora_adapter {
  void *xa, *dlora_a, *dlora_b, *dgate;
  float* dscaling;
  const void *lora_a, *lora_b, *gate;
  const float* scaling;
  int64_t r, first_row, rows, gate_stride_m, threshold;
};

// ft_cpu_lora_linear of `count` layers of one x, each with one adapter on all of its m rows,
// drawing with seed + j.
FT_API int ft_cpu_lora_projections(const ft_lora_layer* layers, const ft_lora_adapter* adapters,
                                   const void* x, const int64_t* rng, int64_t count, int64_t m,
                                   int64_t k, int64_t x_stride_m, int64_t x_stride_k, int32_t dtype,
                                   int32_t adapter_dtype, int32_t threads);
// [out] dx (m, k) or null: the sum over the layers, rounded once; count is at most 16.
FT_API int ft_cpu_lora_projections_backward(void* dx, const ft_lora_layer* layers,
                                            const ft_lora_adapter* adapters, const void* x,
                                            const int64_t* rng, int64_t count, int64_t m, int64_t k,
                                            int64_t x_stride_m, int64_t x_stride_k, int32_t dtype,
                                            int32_t adapter_dtype, int32_t threads);

// ft_cpu_lora_linear of one layer with `count` adapters, whose rows follow each other from row 0
// on; rows beyond them get the base alone. Adapter j's mask is that of its own rows, with seed + j.
FT_API int ft_cpu_lora_adapters(const ft_lora_layer* layer, const ft_lora_adapter* adapters,
                                const void* x, const int64_t* rng, int64_t count, int64_t m,
                                int64_t k, int64_t x_stride_m, int64_t x_stride_k, int32_t dtype,
                                int32_t adapter_dtype, int32_t threads);
FT_API int ft_cpu_lora_adapters_backward(void* dx, const ft_lora_layer* layer,
                                         const ft_lora_adapter* adapters, const void* x,
                                         const int64_t* rng, int64_t count, int64_t m, int64_t k,
                                         int64_t x_stride_m, int64_t x_stride_k, int32_t dtype,
                                         int32_t adapter_dtype, int32_t threads);

// norm_n = |W_n + s * B_n A|, of rows, W + s B A made and summed by tiles.
// [out] norm (n) float; [in] weight (n, k), lora_a (r, k), lora_b (n, r), scaling: one float.
FT_API int ft_cpu_dora_norm(float* norm, const void* weight, const void* lora_a, const void* lora_b,
                            const float* scaling, int64_t n, int64_t k, int64_t r,
                            int64_t weight_stride_n, int64_t weight_stride_k, int32_t dtype,
                            int32_t adapter_dtype, int32_t threads);

// y = x * g + b along columns, rounded once. [out] y (m, n); [in] x (m, n), scale (n) float,
// bias (n) or null.
FT_API int ft_cpu_scale_columns(void* y, const void* x, const float* scale, const void* bias,
                                int64_t m, int64_t n, int64_t x_stride_m, int64_t x_stride_n,
                                int32_t dtype, int32_t threads);

// dx = grad * g, dscale = sum_m grad * x, dbias = sum_m grad, in one pass.
// [out] dx (m, n), dscale (n) float, dbias (n); [in] x is read for dscale.
FT_API int ft_cpu_scale_columns_backward(void* dx, float* dscale, void* dbias, const void* grad,
                                         const void* x, const float* scale, int64_t m, int64_t n,
                                         int64_t grad_stride_m, int64_t grad_stride_n,
                                         int64_t x_stride_m, int64_t x_stride_n, int32_t dtype,
                                         int32_t threads);

// sums_n = sum_k |U V^T - W|, by tiles. [out] sums (n) float; [in] u (n, r), v (k, r), w (n, k) or
// null.
FT_API int ft_cpu_abs_row_sums(float* sums, const void* u, const void* v, const void* w, int64_t n,
                               int64_t k, int64_t r, int64_t u_stride_n, int64_t u_stride_r,
                               int64_t v_stride_k, int64_t v_stride_r, int64_t w_stride_n,
                               int64_t w_stride_k, int32_t dtype, int32_t threads);

// With Z = sign(U V^T - W) * grad along rows, by tiles: du = Z V, dv = Z^T U, dw = -Z.
// [out] du (n, r), dv (k, r), dw (n, k); [in] grad (n) float.
FT_API int ft_cpu_abs_row_sums_backward(void* du, void* dv, void* dw, const float* grad,
                                        const void* u, const void* v, const void* w, int64_t n,
                                        int64_t k, int64_t r, int64_t u_stride_n,
                                        int64_t u_stride_r, int64_t v_stride_k, int64_t v_stride_r,
                                        int64_t w_stride_n, int64_t w_stride_k, int32_t dtype,
                                        int32_t threads);

// ---- ptq4: quantized activations ------------------------------------------------------------

// y = x^ W^T + b with W[n, perm[j]] = scale[n, g] * (code[n, j] - zero[n, g]), g = j / group_size,
// and x^ = x with every group of a row rounded to 8 bits, symmetric; see pyfastft/ops/ptq4.md.
// [out] y (m, n); [in] x (m, k), codes (n, ceil(k / 2)) with the low nibble first, scale (n,
// groups) float or bfloat16, zero (n, groups): uint8, or with float_zero float; or null, which is
// 8; perm (k) or null; bias (n) or null.
FT_API int ft_cpu_int4_linear_a8(void* y, const void* x, const uint8_t* codes, const void* scale,
                                 const void* zero, const int32_t* perm, const void* bias, int64_t m,
                                 int64_t n, int64_t k, int64_t group_size, int64_t x_stride_m,
                                 int64_t x_stride_k, int32_t zero_kind, int32_t scale_dtype,
                                 int32_t dtype, int32_t threads);

// The same with x^ = x_scale * (clamp(round(x / x_scale) + zero, 0, 15) - zero), zero being x_zero
// rounded and clamped. [in] x_scale, x_zero: (x_groups), 1 or the weight's groups.
FT_API int ft_cpu_int4_linear_a4(void* y, const void* x, const uint8_t* codes, const void* scale,
                                 const uint8_t* zero, const int32_t* perm, const void* bias,
                                 const float* x_scale, const float* x_zero, int64_t m, int64_t n,
                                 int64_t k, int64_t group_size, int64_t x_groups,
                                 int64_t x_stride_m, int64_t x_stride_k, int32_t scale_dtype,
                                 int32_t dtype, int32_t threads);

// y = x^ of ft_cpu_int4_linear_a4. [out] y (m, k); feature perm[j] is in group j / group_size.
FT_API int ft_cpu_fake_quantize4(void* y, const void* x, const float* x_scale, const float* x_zero,
                                 const int32_t* perm, int64_t m, int64_t k, int64_t group_size,
                                 int64_t x_groups, int64_t x_stride_m, int64_t x_stride_k,
                                 int32_t dtype, int32_t threads);

// Its gradients, straight through the roundings. [out] dx (m, k), dscale (x_groups), dzero
// (x_groups), or null; [in] grad (m, k).
FT_API int ft_cpu_fake_quantize4_backward(void* dx, float* dscale, float* dzero, const void* grad,
                                          const void* x, const float* x_scale, const float* x_zero,
                                          const int32_t* perm, int64_t m, int64_t k,
                                          int64_t group_size, int64_t x_groups,
                                          int64_t grad_stride_m, int64_t grad_stride_k,
                                          int64_t x_stride_m, int64_t x_stride_k, int32_t dtype,
                                          int32_t threads);

// y = x W^T + b with W[n, k] = scale[n] * code[n, k], accumulated in float32.
// [out] y (m, n); [in] x (m, k), codes (n, k), scale (n), bias (n) or null.
FT_API int ft_cpu_int8_linear(void* y, const void* x, const int8_t* codes, const float* scale,
                              const void* bias, int64_t m, int64_t n, int64_t k, int64_t x_stride_m,
                              int64_t x_stride_k, int64_t codes_stride_n, int64_t codes_stride_k,
                              int32_t dtype, int32_t threads);

// [out] dx (m, k) = grad W, dscale (n) float = sum_k (grad^T x) * code, dbias (n) = sum_m grad, or
// null; [in] grad (m, n); x (m, k) is read for dscale.
FT_API int ft_cpu_int8_linear_backward(void* dx, float* dscale, void* dbias, const void* grad,
                                       const void* x, const int8_t* codes, const float* scale,
                                       int64_t m, int64_t n, int64_t k, int64_t grad_stride_m,
                                       int64_t grad_stride_n, int64_t x_stride_m,
                                       int64_t x_stride_k, int64_t codes_stride_n,
                                       int64_t codes_stride_k, int32_t dtype, int32_t threads);

// ---- ptq4: quantizers ----------------------------------------------------------------------

// W (n, k) in codes of 4 bits, groups of group_size along k with a scale each, the last group of a
// row possibly shorter; the arithmetic is in csrc/cpu/ptq4/quantize_weight.inl.hpp. A group with a
// weight that is not finite has the codes of zeros and a NaN as its scale. scale_dtype FT_FLOAT16
// rounds to float16 and stores floats. [out] codes (n, ceil(k / 2)), the even column in the low
// half; scale (n, ceil(k / group_size)).

// Round-to-nearest, the best of `grid` clipped ranges by squared error. [out] zero or null: uint8,
// as scale; [in] table: the codebook's 16 values, or null for integers.
FT_API int ft_cpu_rtn_quantize(uint8_t* codes, void* scale, uint8_t* zero, const void* weight,
                               const float* table, int64_t n, int64_t k, int64_t group_size,
                               int64_t weight_stride_n, int32_t symmetric, int32_t grid,
                               int32_t dtype, int32_t scale_dtype, int32_t threads);
// HQQ. [out] zero: as scale, or uint8 if round_zero; [in] options: power, beta and kappa.
FT_API int ft_cpu_hqq_quantize(uint8_t* codes, void* scale, void* zero, const void* weight,
                               const float* options, int64_t n, int64_t k, int64_t group_size,
                               int64_t weight_stride_n, int32_t round_zero, int32_t iterations,
                               int32_t dtype, int32_t scale_dtype, int32_t threads);
// ---- masked --------------------------------------------------------------------------------
// The trained part of a weight (N, K) is `count` equal rectangles of rows x columns, given by the
// flat offsets of their first elements: index, ascending, int32 or int64 by index_bytes. Their size
// divides N and K, and they lie on its grid. stride is K, size N * K. Values stand rectangle by
// rectangle, each row after row. Every function fails, before it writes, where an index does not
// ascend, lies outside, or is off the grid.

// A weight's trained part in a step; each field as described there.
struct ft_masked_segment {
  void* weight;
  float *value, *first, *second;
  const float* grad;
  const void* index;
  int64_t count, rows, columns, stride, size, dtype, index_bytes;
};

// The numbers of a segment's hyperparameters: lr, weight_decay, the step's number from 1 on, the
// gradient's sign, and AdamW: beta1, beta2, eps; SGD: momentum, dampening, nesterov; Lion: beta1,
// beta2, 0.
constexpr int64_t FT_STEP_HYPERS = 7;

// One optimizer step of method 0 AdamW, 1 SGD, 2 Lion on `count` segments in one launch.
// [in, out] weight, value (float, the master; null: the weight holds the values), first and second
// (float: moments, or SGD's momentum or null); [in] grad (float), hypers (count, FT_STEP_HYPERS),
// rng: int64 (seed, offset): weights are rounded stochastically, or null: to nearest.
FT_API int ft_cpu_masked_step(const ft_masked_segment* segments, const double* hypers,
                              const int64_t* rng, int64_t count, int32_t method, int32_t threads);

// A tensor to select entries of; exclude: ascending flat offsets that are left out, or none.
struct ft_masked_scored {
  const void *a, *b, *exclude;
  int64_t size, columns, excluded, exclude_bytes, dtype;
};

// The k entries of the largest (or smallest) scores of all tensors, exactly; of equal scores the
// first, NaN last. score: 0 |a|, 1 a^2, 2 a, 3 |a b|, 4 -a b, 5 |a - b|, 6 |a| b with b one float
// per column, 7 random by position. [out] index (k): ascending positions in all tensors, one after
// the other, counts (count): how many in each; [in] rng: int64 (seed, offset), of a random score.
FT_API int ft_cpu_select_topk(int64_t* index, int64_t* counts, const ft_masked_scored* tensors,
                              const int64_t* rng, int64_t count, int64_t k, int32_t score,
                              int32_t largest, int32_t threads);

// values = (grad^T x) at the rectangles, accumulated in float32. [out] values (count * rows *
// columns) float; [in] grad (m, n), x (m, k).
FT_API int ft_cpu_masked_weight_grad(float* values, const void* grad, const void* x,
                                     const void* index, int64_t m, int64_t n, int64_t k,
                                     int64_t grad_stride_m, int64_t grad_stride_n,
                                     int64_t x_stride_m, int64_t x_stride_k, int64_t count,
                                     int64_t rows, int64_t columns, int32_t index_bytes,
                                     int32_t dtype, int32_t threads);

// [out] values: the weight's entries at the rectangles, bit for bit.
FT_API int ft_cpu_masked_gather(void* values, const void* weight, const void* index, int64_t count,
                                int64_t rows, int64_t columns, int64_t stride, int64_t size,
                                int32_t index_bytes, int32_t dtype, int32_t threads);
// weight = values at the rectangles, or weight += alpha * values in float32, rounded once; values
// of the weight's dtype or float. [in, out] weight; [in] alpha: one float, or null.
FT_API int ft_cpu_masked_scatter(void* weight, const void* values, const void* index,
                                 const float* alpha, int64_t count, int64_t rows, int64_t columns,
                                 int64_t stride, int64_t size, int32_t index_bytes,
                                 int32_t values_dtype, int32_t dtype, int32_t threads);

// The entries `kept` of an index and those grown, merged, and where each came from: its place in
// the index, or -1. [out] merged, source (kept_count + grown_count); [in] index (count),
// kept (kept_count): ascending places, grown (grown_count): ascending, none of those kept.
FT_API int ft_cpu_masked_merge(void* merged, int64_t* source, const void* index,
                               const int64_t* kept, const void* grown, int64_t count,
                               int64_t kept_count, int64_t grown_count, int32_t index_bytes);

// ---- prune ---------------------------------------------------------------------------------

// A weight W (n, k) made of blocks of rows x columns, those at the ends reaching beyond it: values
// (blocks, rows, columns), contiguous, and index, laid out and checked by
// pyfastft/ops/prune/_pattern.py.

// y = x W^T + b, accumulated in float32. [out] y (m, n); [in] x (m, k), bias (n) or null.
FT_API int ft_cpu_block_sparse_linear(void* y, const void* x, const void* values, const void* bias,
                                      const int32_t* index, int64_t m, int64_t n, int64_t k,
                                      int64_t blocks, int64_t rows, int64_t columns,
                                      int64_t x_stride_m, int64_t x_stride_k, int32_t dtype,
                                      int32_t threads);
// dx = grad W, dvalues = grad^T x at the blocks, zero beyond W, dbias = sum_m grad.
// [out] dx (m, k), dvalues (blocks, rows, columns), dbias (n); [in] grad (m, n), x for dvalues.
FT_API int ft_cpu_block_sparse_linear_backward(void* dx, void* dvalues, void* dbias,
                                               const void* grad, const void* x, const void* values,
                                               const int32_t* index, int64_t m, int64_t n,
                                               int64_t k, int64_t blocks, int64_t rows,
                                               int64_t columns, int64_t grad_stride_m,
                                               int64_t grad_stride_n, int64_t x_stride_m,
                                               int64_t x_stride_k, int32_t dtype, int32_t threads);

// ---- lora on a GPU -------------------------------------------------------------------------

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

// ---- ptq4 ----------------------------------------------------------------------------------

// A 4-bit weight W (n, k), as pyfastft/ops/ptq4.md has it: codes (n, ceil(k / 2)), the lower nibble
// first; scale (n, ceil(k / group_size)) of scale_dtype, float32 or bfloat16; zero of that shape,
// of zero_kind, see codebook.h; perm (k) or null, the feature of each position. What perm holds is
// checked before it is followed.

// [out] weight (n, k): scale * (table[c] - zero), each rounded to float32, and once to dtype.
FT_API int ft_cpu_int4_dequantize(void* weight, const uint8_t* codes, const void* scale,
                                  const void* zero, const int32_t* perm, int64_t n, int64_t k,
                                  int64_t group_size, int32_t codebook, int32_t zero_kind,
                                  int32_t scale_dtype, int32_t dtype, int32_t threads);

// y = x W^T + b. [out] y (m, n); [in] x (m, k), bias (n) or null.
FT_API int ft_cpu_int4_linear(void* y, const void* x, const uint8_t* codes, const void* scale,
                              const void* zero, const void* bias, const int32_t* perm, int64_t m,
                              int64_t n, int64_t k, int64_t group_size, int64_t x_stride_m,
                              int64_t x_stride_k, int32_t codebook, int32_t zero_kind,
                              int32_t scale_dtype, int32_t dtype, int32_t threads);

// With D = grad^T x: dx = grad W, dscale = sum over a group of D * (table[c] - zero), dzero =
// -scale * sum over a group of D, dbias = sum_m grad.
// [out] dx (m, k), dscale and dzero of the scale's shape and dtype, dbias (n); [in] grad (m, n);
// x is read for dscale and dzero.
FT_API int ft_cpu_int4_linear_backward(void* dx, void* dscale, void* dzero, void* dbias,
                                       const void* grad, const void* x, const uint8_t* codes,
                                       const void* scale, const void* zero, const int32_t* perm,
                                       int64_t m, int64_t n, int64_t k, int64_t group_size,
                                       int64_t grad_stride_m, int64_t grad_stride_n,
                                       int64_t x_stride_m, int64_t x_stride_k, int32_t codebook,
                                       int32_t zero_kind, int32_t scale_dtype, int32_t dtype,
                                       int32_t threads);

// ft_cpu_lora_linear and its gradients on a 4-bit weight, without a gate.
FT_API int ft_cpu_int4_lora_linear(void* y, void* xa, const void* x, const uint8_t* codes,
                                   const void* scale, const void* zero, const void* lora_a,
                                   const void* lora_b, const void* bias, const float* scaling,
                                   const int64_t* rng, const int32_t* perm, int64_t m, int64_t n,
                                   int64_t k, int64_t r, int64_t group_size, int64_t x_stride_m,
                                   int64_t x_stride_k, uint32_t threshold, int32_t codebook,
                                   int32_t zero_kind, int32_t scale_dtype, int32_t dtype,
                                   int32_t adapter_dtype, int32_t threads);
FT_API int ft_cpu_int4_lora_linear_backward(
    void* dx, void* dscale, void* dzero, void* dlora_a, void* dlora_b, void* dbias, float* dscaling,
    const void* grad, const void* x, const uint8_t* codes, const void* scale, const void* zero,
    const void* lora_a, const void* lora_b, const void* xa, const float* scaling,
    const int64_t* rng, const int32_t* perm, int64_t m, int64_t n, int64_t k, int64_t r,
    int64_t group_size, int64_t grad_stride_m, int64_t grad_stride_n, int64_t x_stride_m,
    int64_t x_stride_k, uint32_t threshold, int32_t codebook, int32_t zero_kind,
    int32_t scale_dtype, int32_t dtype, int32_t adapter_dtype, int32_t threads);

// 4-bit weights on a GPU. codes (n, ceil(k / 2)) bytes, an even k in the low half of its byte;
// scale and zero (n, ceil(k / group_size)); zero_kind is one of ft_zero. W[n, k] = scale * (code -
// zero), or scale * table[code] where there is a table of 16 floats. All pointers are the device's.

// Columns of W in the order of the codes, or all of W in that of the features.
// [out] weight (n, columns), contiguous: those from first_column, an even one, on; with perm (k),
// where it is all columns, column j of the codes is column perm[j] of weight.
FT_API int ft_cuda_int4_dequantize(void* weight, const uint8_t* codes, const void* scale,
                                   const void* zero, const int32_t* perm, const float* table,
                                   int64_t n, int64_t k, int64_t group_size, int64_t first_column,
                                   int64_t columns, int32_t scale_dtype, int32_t zero_kind,
                                   int32_t dtype, void* stream);

// y = x W^T + bias for at most four rows; group_size is a multiple of 16 or at least k.
// [out] y (m, n); [work] partials: splits * m * n floats where splits > 1; [in] x (m, k) with a row
// stride and unit column stride, bias (n) or null. K is cut into `splits` parts.
FT_API int ft_cuda_int4_gemv(void* y, float* partials, const void* x, const uint8_t* codes,
                             const void* scale, const void* zero, const void* bias,
                             const float* table, int64_t partials_floats, int64_t m, int64_t n,
                             int64_t k, int64_t group_size, int64_t x_stride_m, int64_t splits,
                             int32_t scale_dtype, int32_t zero_kind, int32_t dtype, void* stream);

// The same for at most 64 rows of a half dtype on tensor cores; k is a multiple of 32, so is
// group_size unless it is at least k, and rows of x and of codes begin at multiples of 16 bytes.
FT_API int ft_cuda_int4_mma(void* y, float* partials, const void* x, const uint8_t* codes,
                            const void* scale, const void* zero, const void* bias,
                            const float* table, int64_t partials_floats, int64_t m, int64_t n,
                            int64_t k, int64_t group_size, int64_t x_stride_m, int64_t splits,
                            int32_t scale_dtype, int32_t zero_kind, int32_t dtype, void* stream);

// ---- masked on a GPU -----------------------------------------------------------------------

// All pointers are the device's but those of the two plans, which read and write the host's memory
// and launch nothing. starts (count + 1, 2): how many blocks, and how many values or elements, the
// segments or tensors before each have; the last row counts all.

// The numbers of a segment that a step multiplies by, as csrc/include/fastft/masked.h has them.
constexpr int64_t FT_STEP_FACTORS = 8;

// [out] starts, factors (count, FT_STEP_FACTORS); segments, whose addresses are the device's and
// not followed, hypers and method as ft_cpu_masked_step has them.
FT_API int ft_cuda_masked_step_plan(int64_t* starts, float* factors,
                                    const ft_masked_segment* segments, const double* hypers,
                                    int64_t count, int32_t method);
// ft_cpu_masked_step, but nothing reads what an index holds before it is used. blocks: the plan's.
FT_API int ft_cuda_masked_step(const ft_masked_segment* segments, const int64_t* starts,
                               const float* factors, const int64_t* rng, int64_t count,
                               int64_t blocks, int32_t method, void* stream);

// [out] starts, words: how many the workspace has; tensors as for the step.
FT_API int ft_cuda_select_topk_plan(int64_t* starts, int64_t* words,
                                    const ft_masked_scored* tensors, int64_t count);
// ft_cpu_select_topk for k of at least 1, but nothing reads what an exclude holds before it is
// used. [work] workspace: so many words of 0.
FT_API int ft_cuda_select_topk(int64_t* index, int64_t* counts, int64_t* workspace,
                               const ft_masked_scored* tensors, const int64_t* starts,
                               const int64_t* rng, int64_t words, int64_t count, int64_t blocks,
                               int64_t k, int32_t score, int32_t largest, void* stream);
