// The lora family's kernel bodies, for one level of the instruction set. Symbols as in
// pyfastft/ops/lora.md: M tokens, N out, K in, R rank, S = dropout(x) A^T, T = grad B.
#include "cpu/vec.inl.hpp"
// After the vocabulary:
#include "cpu/dropout.inl.hpp"
#include "cpu/gemm.inl.hpp"

namespace {

inline Operand masked(Operand a, const uint8_t* mask, int64_t line_stride, int64_t depth_stride) {
  a.mask = mask;
  a.mask_line_stride = line_stride;
  a.mask_depth_stride = depth_stride;
  return a;
}

// Products with R rows or columns of C keep R as the rows: a register tile has just as many, while
// columns come in whole vectors.
inline void lora_forward(const LoraForward& f) {
  const ScratchScope scope;
  const uint8_t* mask = dropout_mask(f.dropout, f.m * f.k, f.threads);

  // S^T = A dropout(x)^T; the scale of what is kept is applied once, to the sum.
  const Operand x = dense(f.x, f.x_stride_m, f.x_stride_k);
  const Product down = scaled(product(dense(f.lora_a, f.k, 1), f.adapter_dtype,
                                      masked(x, mask, f.k, 1), f.dtype, f.k, kShortDepthItems),
                              f.dropout.scale);
  gemm(f.r, f.m, &down, 1, result(f.xa, f.adapter_dtype, 1, f.r), f.threads);

  // y = s * S B^T + x W^T + b, with S as it was rounded to its dtype.
  const Product up_and_base[] = {
      scaled(product(dense(f.xa, f.r, 1), f.adapter_dtype, dense(f.lora_b, f.r, 1), f.adapter_dtype,
                     f.r),
             f.scaling),
      product(x, f.dtype, dense(f.weight, f.weight_stride_n, f.weight_stride_k), f.dtype, f.k)};
  Result y = result(f.y, f.dtype, f.n, 1);
  y.bias = f.bias;
  gemm(f.m, f.n, up_and_base, 2, y, f.threads);
}

// sum(T * S), T stored (R, M) and S (M, R): double sums of one row of T after the other.
template <class T>
float sum_of_products(const float* t, const T* xa, int64_t m, int64_t r) {
  double total = 0;
  for (int64_t rank = 0; rank < r; ++rank)
    for (int64_t token = 0; token < m; ++token)
      total += double(t[rank * m + token]) * double(to_float(xa[token * r + rank]));
  return float(total);
}

inline void lora_backward(const LoraBackward& f) {
  const ScratchScope scope;
  const uint8_t* mask = f.dx || f.dlora_a ? dropout_mask(f.dropout, f.m * f.k, f.threads) : nullptr;
  const float scale = f.scaling * f.dropout.scale;
  const Operand grad = dense(f.grad, f.grad_stride_m, f.grad_stride_n);
  const Operand grad_t = dense(f.grad, f.grad_stride_n, f.grad_stride_m);
  const Operand x_t = dense(f.x, f.x_stride_k, f.x_stride_m);
  float* t = nullptr;  // T^T, (R, M)

  if (f.dx || f.dlora_a || f.dscaling) {
    t = static_cast<float*>(scratch(Scratch::kLowRank, (f.r * f.m + 1) * int64_t(sizeof(float))));
    const Product down =
        product(dense(f.lora_b, 1, f.r), f.adapter_dtype, grad, f.dtype, f.n, kShortDepthItems);
    gemm(f.r, f.m, &down, 1, result(t, FT_FLOAT32, f.m, 1), f.threads);
  }
  if (f.dlora_b) {
    const Product sum = scaled(
        product(dense(f.xa, 1, f.r), f.adapter_dtype, grad_t, f.dtype, f.m, kShortDepthItems),
        f.scaling);
    gemm(f.r, f.n, &sum, 1, result(f.dlora_b, f.adapter_dtype, 1, f.r), f.threads);
  }
  if (f.dlora_a) {
    const Product sum = scaled(product(dense(t, f.m, 1), FT_FLOAT32, masked(x_t, mask, 1, f.k),
                                       f.dtype, f.m, kShortDepthItems),
                               scale);
    gemm(f.r, f.k, &sum, 1, result(f.dlora_a, f.adapter_dtype, f.k, 1), f.threads);
  }
  if (f.dx) {
    const Product up_and_base[] = {
        scaled(product(dense(t, 1, f.m), FT_FLOAT32, dense(f.lora_a, 1, f.k), f.adapter_dtype, f.r),
               scale, mask, f.k),
        product(grad, f.dtype, dense(f.weight, f.weight_stride_k, f.weight_stride_n), f.dtype,
                f.n)};
    gemm(f.m, f.k, up_and_base, 2, result(f.dx, f.dtype, f.k, 1), f.threads);
  }
  if (f.dweight) {
    const Product sum = product(grad_t, f.dtype, x_t, f.dtype, f.m);
    gemm(f.n, f.k, &sum, 1, result(f.dweight, f.dtype, f.k, 1), f.threads);
  }
  if (f.dbias) {
    // A row of ones times grad, so that the sum has the core's order and small error.
    const uint16_t bf16_one = 0x3f80, fp16_one = 0x3c00;
    const float one = 1.0f;
    const void* ones = f.dtype == FT_FLOAT32    ? static_cast<const void*>(&one)
                       : f.dtype == FT_BFLOAT16 ? static_cast<const void*>(&bf16_one)
                                                : static_cast<const void*>(&fp16_one);
    const Product sum = product(dense(ones, 0, 0), f.dtype, grad_t, f.dtype, f.m, kShortDepthItems);
    gemm(1, f.n, &sum, 1, result(f.dbias, f.dtype, f.n, 1), f.threads);
  }
  if (f.dscaling) {
    if (f.adapter_dtype == FT_FLOAT32)
      *f.dscaling = sum_of_products(t, static_cast<const float*>(f.xa), f.m, f.r);
    else if (f.adapter_dtype == FT_BFLOAT16)
      *f.dscaling = sum_of_products(t, static_cast<const bf16*>(f.xa), f.m, f.r);
    else
      *f.dscaling = sum_of_products(t, static_cast<const fp16*>(f.xa), f.m, f.r);
  }
}

constexpr LoraKernels kLora{lora_forward, lora_backward};

}  // namespace
