// The kernel bodies of lora_linear, lora_projections and lora_adapters, for one level of the
// instruction set. Symbols as in pyfastft/ops/lora.md: M tokens, N out, K in, R rank,
// S = dropout(x) A^T, U = S * g, T = grad B, V = T * g.
#include "cpu/vec.inl.hpp"
// After the vocabulary:
#include "cpu/dropout.inl.hpp"
#include "cpu/gemm.inl.hpp"

namespace {

static_assert(2 * kMaxProjections <= kMaxProducts, "dx is one sum");
// Packed once for all projections while it is no larger than what scratch buffers keep.
constexpr int64_t kSharedFloats = int64_t(16) << 20;

inline Operand masked(Operand a, const uint8_t* mask, int64_t line_stride, int64_t depth_stride) {
  a.mask = mask;
  a.mask_line_stride = line_stride;
  a.mask_depth_stride = depth_stride;
  return a;
}

// ---- adapters ------------------------------------------------------------------------------

// body(first adapter, behind the last, first row, behind the last) for parts of a layer's rows that
// no more adapters serve than one call of gemm has products for beside the base.
template <class Body>
void for_each_part(const LoraCall& f, int64_t first, int64_t end, const Body& body) {
  for (int64_t a = first; a < end;) {
    const int64_t next = lesser(end, a + kMaxProducts - 1);
    body(a, next, a == first ? 0 : f.adapters[a].first_row,
         next == end ? f.m : f.adapters[next].first_row);
    a = next;
  }
}

// A low-rank product of C's rows from row0 on, for the rows that are the adapter's.
inline Product served(Product q, const LoraAdapter& a, int64_t row0) {
  q.first_row = a.first_row - row0;
  q.end_row = q.first_row + a.rows;
  return q;
}

// Rows of S by a gate, rounded as S is, or S itself; `to` has a row stride of its own.
template <class T>
void copy_u(const LoraAdapter& a, T* to, int64_t stride) {
  const T* s = static_cast<const T*>(a.xa);
  const T* gate = static_cast<const T*>(a.gate);
  for (int64_t row = 0; row < a.rows; ++row, s += a.r, to += stride)
    for (int64_t rank = 0; rank < a.r; rank += kLanes) {
      const int n = int(lesser(kLanes, a.r - rank));
      Vec u = load(s + rank, n);
      if (gate) u = mul(u, load(gate + row * a.gate_stride_m + rank, n));
      store(to + rank, u, n);
    }
}

// U (M, rank) of the adapters [first, end), each in its rows and first columns.
inline void* copied_u(const LoraCall& f, int64_t first, int64_t end) {
  void* u = scratch(Scratch::kSharedRows, f.m * f.rank * element_bytes(f.adapter_dtype) + 1);
  for (int64_t a = first; a < end; ++a) {
    const LoraAdapter& adapter = f.adapters[a];
    void* to = advanced(u, f.adapter_dtype, adapter.first_row * f.rank);
    if (f.adapter_dtype == FT_FLOAT32)
      copy_u(adapter, static_cast<float*>(to), f.rank);
    else if (f.adapter_dtype == FT_BFLOAT16)
      copy_u(adapter, static_cast<bf16*>(to), f.rank);
    else
      copy_u(adapter, static_cast<fp16*>(to), f.rank);
  }
  return u;
}

// ---- the base ------------------------------------------------------------------------------

inline bool has_base(const ft_lora_layer& layer) {
  return layer.weight || layer.packed || layer.packed_dx;
}

// W as the columns of the forward's product: ready, plain, or read across.
inline Operand base_columns(const ft_lora_layer& layer) {
  if (layer.packed) return packed_columns(layer.packed);
  if (layer.weight) return dense(layer.weight, layer.weight_stride_n, layer.weight_stride_k);
  return packed_transposed(layer.packed_dx);
}

// W^T as those of dx.
inline Operand base_columns_of_dx(const ft_lora_layer& layer) {
  if (layer.packed_dx) return packed_columns(layer.packed_dx);
  if (layer.weight) return dense(layer.weight, layer.weight_stride_k, layer.weight_stride_n);
  return packed_transposed(layer.packed);
}

// ---- forward -------------------------------------------------------------------------------

// C (r, tokens) = scale * factor operand^T with strides of C: r lines of an adapter by as many of x
// or grad as there are tokens. Products with R rows or columns of C keep R as the rows: a register
// tile has just as many, while columns come in whole vectors. A few tokens are the rows, so that
// the adapter is read where it lies.
inline void low_rank(const LoraCall& f, int64_t r, int64_t tokens, const Operand& factor,
                     const Operand& operand, int64_t depth, float scale, void* c, int32_t dtype,
                     int64_t stride_r, int64_t stride_tokens) {
  const bool few = tokens <= kFewRows;
  const Product q =
      few ? product(operand, f.dtype, factor, f.adapter_dtype, depth, kShortDepthItems)
          : product(factor, f.adapter_dtype, operand, f.dtype, depth, kShortDepthItems);
  const Product sum = scaled(q, scale);
  if (few)
    gemm(tokens, r, &sum, 1, result(c, dtype, stride_tokens, stride_r), f.threads);
  else
    gemm(r, tokens, &sum, 1, result(c, dtype, stride_r, stride_tokens), f.threads);
}

inline void lora_down(const LoraCall& f, const LoraAdapter& a) {
  const uint8_t* mask = nullptr;
  if (a.dropout.threshold && a.rows && f.k) {
    uint8_t* drawn = static_cast<uint8_t*>(scratch(Scratch::kMask, mask_bytes(a.rows * f.k)));
    write_mask(a.dropout, a.rows * f.k, drawn, f.threads);
    mask = drawn;
  }
  // S^T = A dropout(x)^T; the scale of what is kept is applied once, to the sum.
  const Operand x =
      dense(advanced(f.x, f.dtype, a.first_row * f.x_stride_m), f.x_stride_m, f.x_stride_k);
  low_rank(f, a.r, a.rows, dense(a.lora_a, f.k, 1), masked(x, mask, f.k, 1), f.k, a.dropout.scale,
           a.xa, f.adapter_dtype, 1, a.r);
}

// `base`, where there is one, is that of the only layer, on all rows and with one adapter.
inline void lora_forward(const LoraCall& f, const Product* base) {
  const ScratchScope scope;
  for (int64_t a = 0; a < f.adapter_count; ++a) lora_down(f, f.adapters[a]);

  const Operand all_rows = dense(f.x, f.x_stride_m, f.x_stride_k);
  Operand shared = all_rows;
  if (f.layer_count > 1) {
    Product base = product(all_rows, f.dtype, all_rows, f.dtype, f.k);
    if (panel_floats(base.depth, {0, f.m, row_height(f.m)}) <= kSharedFloats) {
      pack_rows(base, f.m, f.threads);
      shared = base.rows;
    }
  }
  // y = x W^T + s * U B^T + b, U and S as they were rounded to their dtype.
  for (int64_t at = 0; at < f.layer_count; ++at) {
    const ft_lora_layer& layer = f.layers[at];
    const int64_t first = f.layer_count == 1 ? 0 : at;
    const int64_t end = f.layer_count == 1 ? f.adapter_count : at + 1;
    const void* u = f.copies_u ? copied_u(f, first, end) : f.adapters[at].xa;
    const int64_t u_stride = f.copies_u ? f.rank : f.adapters[at].r;
    for_each_part(f, first, end, [&](int64_t a, int64_t behind, int64_t row0, int64_t row1) {
      Product products[kMaxProducts];
      int count = 0;
      if (base) {
        products[count++] = *base;
      } else if (has_base(layer)) {
        const Operand x = f.layer_count > 1 ? shared
                                            : dense(advanced(f.x, f.dtype, row0 * f.x_stride_m),
                                                    f.x_stride_m, f.x_stride_k);
        products[count++] = product(x, f.dtype, base_columns(layer), f.dtype, f.k);
      }
      const void* rows = advanced(u, f.adapter_dtype, row0 * u_stride);
      for (; a < behind; ++a) {
        const LoraAdapter& adapter = f.adapters[a];
        if (!adapter.rows) continue;
        const Product up = product(dense(rows, u_stride, 1), f.adapter_dtype,
                                   dense(adapter.lora_b, adapter.r, 1), f.adapter_dtype, adapter.r);
        products[count++] = served(scaled(up, adapter.scaling_value), adapter, row0);
      }
      Result y = result(advanced(layer.y, f.dtype, row0 * layer.n), f.dtype, layer.n, 1);
      y.bias = layer.bias;
      y.accumulate = f.accumulate;
      gemm(row1 - row0, layer.n, products, count, y, f.threads);
    });
  }
}

// ---- backward ------------------------------------------------------------------------------

// What takes T (r, rows) and S (rows, r) element by element: ds = sum(T * S * g), dg = s * T * S;
// T becomes V. Sums in double, of one rank after the other.
template <class S>
void gate_gradients(const LoraCall& f, const LoraAdapter& a, float* t) {
  const S* s = static_cast<const S*>(a.xa);
  const S* gate = static_cast<const S*>(a.gate);
  S* dgate = static_cast<S*>(a.dgate);
  double dscaling = 0;
  for (int64_t rank = 0; rank < a.r; ++rank) {
    double own = 0;
    for (int64_t row = 0; row < a.rows; ++row) {
      float& value = t[rank * f.m + row];
      const double g = gate ? double(to_float(gate[row * a.gate_stride_m + rank])) : 1.0;
      if (s) {
        const double product = double(value) * double(to_float(s[row * a.r + rank]));
        dscaling += product * g;
        own += product;
        if (dgate && a.gate_stride_m)
          dgate[row * a.r + rank] = from_float<S>(float(product * double(a.scaling_value)));
      }
      if (gate) value = float(value * g);
    }
    if (dgate && !a.gate_stride_m) dgate[rank] = from_float<S>(float(own * a.scaling_value));
  }
  if (a.dscaling) *a.dscaling = float(dscaling);
}

// Everything of one adapter but its part of dx; leaves V^T in `t`.
inline void lora_adapter_backward(const LoraCall& f, const ft_lora_layer& layer,
                                  const LoraAdapter& a, const void* u, int64_t u_stride,
                                  const uint8_t* mask, float* t) {
  const void* grad_rows = advanced(layer.grad, f.dtype, a.first_row * layer.grad_stride_m);
  const Operand grad = dense(grad_rows, layer.grad_stride_m, layer.grad_stride_n);
  const Operand grad_t = dense(grad_rows, layer.grad_stride_n, layer.grad_stride_m);
  const bool needs_v = f.dx || a.dlora_a;

  if (needs_v || a.dscaling || a.dgate) {
    low_rank(f, a.r, a.rows, dense(a.lora_b, 1, a.r), grad, layer.n, 1.0f, t, FT_FLOAT32, f.m, 1);
  }
  if (a.dlora_b) {
    const Product sum = scaled(
        product(dense(u, 1, u_stride), f.adapter_dtype, grad_t, f.dtype, a.rows, kShortDepthItems),
        a.scaling_value);
    gemm(a.r, layer.n, &sum, 1, result(a.dlora_b, f.adapter_dtype, 1, a.r), f.threads);
  }
  if (a.dscaling || a.dgate || (a.gate && needs_v)) {
    if (f.adapter_dtype == FT_FLOAT32)
      gate_gradients<float>(f, a, t);
    else if (f.adapter_dtype == FT_BFLOAT16)
      gate_gradients<bf16>(f, a, t);
    else
      gate_gradients<fp16>(f, a, t);
  }
  if (a.dlora_a) {
    const Operand x_t =
        dense(advanced(f.x, f.dtype, a.first_row * f.x_stride_m), f.x_stride_k, f.x_stride_m);
    const Product sum = scaled(product(dense(t, f.m, 1), FT_FLOAT32, masked(x_t, mask, 1, f.k),
                                       f.dtype, a.rows, kShortDepthItems),
                               a.scaling_value * a.dropout.scale);
    gemm(a.r, f.k, &sum, 1, result(a.dlora_a, f.adapter_dtype, f.k, 1), f.threads);
  }
}

inline void lora_base_backward(const LoraCall& f, const ft_lora_layer& layer) {
  const Operand grad_t = dense(layer.grad, layer.grad_stride_n, layer.grad_stride_m);
  if (layer.dweight) {
    const Operand x_t = dense(f.x, f.x_stride_k, f.x_stride_m);
    const Product sum = product(grad_t, f.dtype, x_t, f.dtype, f.m);
    gemm(layer.n, f.k, &sum, 1, result(layer.dweight, f.dtype, f.k, 1), f.threads);
  }
  if (layer.dbias) sum_rows(grad_t, f.m, layer.n, layer.dbias, f.dtype, f.threads);
}

// dx = sum over layers of grad W + s * dropout(V A), of rows [row0, row1), by adapters [a, behind).
inline void lora_dx(const LoraCall& f, int64_t a, int64_t behind, int64_t row0, int64_t row1,
                    const uint8_t* masks, const float* t, const Product* base) {
  Product products[kMaxProducts];
  int count = 0;
  if (base) products[count++] = *base;
  for (int64_t at = 0; at < f.layer_count; ++at) {
    const ft_lora_layer& layer = f.layers[at];
    if (!has_base(layer)) continue;
    const void* grad = advanced(layer.grad, f.dtype, row0 * layer.grad_stride_m);
    products[count++] = product(dense(grad, layer.grad_stride_m, layer.grad_stride_n), f.dtype,
                                base_columns_of_dx(layer), f.dtype, layer.n);
  }
  for (; a < behind; ++a) {
    const LoraAdapter& adapter = f.adapters[a];
    if (!adapter.rows) continue;
    const uint8_t* mask = adapter.dropout.threshold ? masks : nullptr;
    Product up = scaled(product(dense(t + adapter.t - adapter.first_row + row0, 1, f.m), FT_FLOAT32,
                                dense(adapter.lora_a, 1, f.k), f.adapter_dtype, adapter.r),
                        adapter.scaling_value * adapter.dropout.scale, mask, f.k);
    // The mask counts from the adapter's own first row.
    up.mask_element = adapter.mask * 8 - (adapter.first_row - row0) * f.k;
    products[count++] = served(up, adapter, row0);
  }
  Result dx = result(advanced(f.dx, f.dtype, row0 * f.k), f.dtype, f.k, 1);
  dx.accumulate = f.accumulate;
  gemm(row1 - row0, f.k, products, count, dx, f.threads);
}

inline void lora_backward(const LoraCall& f, const Product* base) {
  const ScratchScope scope;
  uint8_t* const masks = static_cast<uint8_t*>(scratch(Scratch::kMask, f.masks_bytes + 1));
  float* const t =
      static_cast<float*>(scratch(Scratch::kLowRank, (f.t_floats + 1) * int64_t(sizeof(float))));
  const void* u = f.copies_u ? copied_u(f, 0, f.adapter_count) : nullptr;

  for (int64_t j = 0; j < f.adapter_count; ++j) {
    const LoraAdapter& a = f.adapters[j];
    const bool drops = a.dropout.threshold && (f.dx || a.dlora_a) && a.rows && f.k;
    if (drops) write_mask(a.dropout, a.rows * f.k, masks + a.mask, f.threads);
    const void* rows = f.copies_u ? advanced(u, f.adapter_dtype, a.first_row * f.rank) : a.xa;
    lora_adapter_backward(f, f.layers[f.layer_count == 1 ? 0 : j], a, rows,
                          f.copies_u ? f.rank : a.r, drops ? masks + a.mask : nullptr, t + a.t);
  }
  for (int64_t at = 0; at < f.layer_count; ++at) lora_base_backward(f, f.layers[at]);
  if (!f.dx) return;
  if (f.layer_count > 1)
    lora_dx(f, 0, f.adapter_count, 0, f.m, masks, t, base);
  else
    for_each_part(f, 0, f.adapter_count,
                  [&](int64_t a, int64_t behind, int64_t row0, int64_t row1) {
                    lora_dx(f, a, behind, row0, row1, masks, t, base);
                  });
}

constexpr LoraKernels kLora{[](const LoraCall& f) { lora_forward(f, nullptr); },
                            [](const LoraCall& f) { lora_backward(f, nullptr); }};

}  // namespace
