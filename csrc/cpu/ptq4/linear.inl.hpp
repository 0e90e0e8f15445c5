// The kernel bodies of int4_dequantize, int4_linear and int4_lora_linear, for one level of the
// instruction set. Symbols as in pyfastft/ops/ptq4.md.
#include "cpu/lora/linear.inl.hpp"
// After the core:
#include "cpu/ptq4/operands.inl.hpp"
// After the operands:
#include "cpu/ptq4/code_tile.inl.hpp"
#include "cpu/ptq4/few_rows.inl.hpp"

namespace {

// Items of depth of panels of float32 weights: short sums, whose error is small.
constexpr int64_t kWeightItems = 128;
// Rows of W that are dequantized, or whose gradient is held, at once.
constexpr int64_t kRowsAtOnce = 64;

inline void dequantize(const Int4Dequantize& f) {
  const int64_t n = f.w.n, k = f.w.k;
  parallel_for(n * k < kSerialWork ? 1 : f.threads, ceil_div(n, kRowsAtOnce),
               [&](int64_t task, int) {
                 const int64_t end = lesser(n, (task + 1) * kRowsAtOnce);
                 for (int64_t feature = 0; feature < k; feature += kLanes) {
                   const int count = int(lesser(kLanes, k - feature));
                   const RowReader row(f.w, feature, count);
                   for (int64_t at = task * kRowsAtOnce; at < end; ++at) {
                     const Vec weights = row.weights(at);
                     void* to = advanced(f.weight, f.dtype, at * k + feature);
                     if (f.dtype == FT_FLOAT32)
                       store(static_cast<float*>(to), weights, count);
                     else if (f.dtype == FT_BFLOAT16)
                       store(static_cast<bf16*>(to), weights, count);
                     else
                       store(static_cast<fp16*>(to), weights, count);
                   }
                 }
               });
}

// ---- x in the order of the codes -----------------------------------------------------------

// Where the eight values of x that meet a lane's codes go: value i at at(lane) + i * step, or with
// pairs the values i and i + 4 together.
struct LaneOrder {
  int64_t lane, block, step;  // in values: from lane to lane of a block, from block to block
};

// A lane after the other, as panels of pairs have them.
constexpr LaneOrder kInLanes{kLaneCodes, kBlockCodes, 2};
// Whole vectors of a block's lanes, as few rows are multiplied.
template <bool kPairs>
constexpr LaneOrder kInVectors{kPairs ? 2 : 1, kBlockCodes, (kPairs ? 2 : 1) * kLanes};

struct Reordering {
  const void* x;
  int64_t stride_m, stride_k;
  const int32_t* perm;
  int64_t k, lanes;  // lanes: of a row of the result, of which some may lie behind k
  LaneOrder order;
  float* lane_sums;       // [row][lane], or null
  float* group_sums;      // [row][group], or null
  int64_t group, groups;  // of positions
};

#if FT_BF16_DOT

// A whole block of neighbours in memory, as reorder_lane has its lanes; returns the lanes' sums.
FT_INLINE Vec reorder_block(const bf16* x, const LaneOrder& order, bool wanted, bf16* to) {
  __m512i v[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i lanes = _mm512_loadu_si512(x + 2 * kLanes * i);
    v[i] = _mm512_unpacklo_epi16(lanes, _mm512_bsrli_epi128(lanes, 8));
  }
  __m512i mixed[4], pairs[4];  // pairs[i]: of values i and i + 4 of every lane
  const __m512i even = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(2));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    mixed[i] = _mm512_permutex2var_epi32(v[2 * i], even, v[2 * i + 1]);
    mixed[i + 2] = _mm512_permutex2var_epi32(v[2 * i], odd, v[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 4; i += 2) {
    pairs[i] = _mm512_shuffle_i64x2(mixed[i], mixed[i + 1], 0x44);
    pairs[i + 1] = _mm512_shuffle_i64x2(mixed[i], mixed[i + 1], 0xee);
  }
  const bool in_lanes = order.step == 2;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) _mm512_storeu_si512(to + 2 * kLanes * i, in_lanes ? v[i] : pairs[i]);
  Vec sum = zero();
  if (!wanted) return sum;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) sum = add(sum, as_floats(_mm512_slli_epi32(pairs[i], 16)));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    sum = add(sum, as_floats(_mm512_and_si512(pairs[i], _mm512_set1_epi32(int(0xffff0000)))));
  return sum;
}

#endif

// The values of lane `lane` of a row x; returns their sum.
template <class T, class To, bool kPairs>
FT_INLINE float reorder_lane(const Reordering& f, const T* x, int64_t lane, To* to) {
  To* const at = to + lane / kLanes * f.order.block + lane % kLanes * f.order.lane;
  float sum = 0;
  for (int i = 0; i < kLaneCodes; ++i) {
    const int64_t j = lane * kLaneCodes + i;
    T value{};
    if (j < f.k) value = x[(f.perm ? f.perm[j] : j) * f.stride_k];
    sum += to_float(value);
    To& place = at[kPairs ? i % 4 * f.order.step + i / 4 : i * f.order.step];
    if constexpr (kPairs)
      place = value;
    else
      place = to_float(value);
  }
  return sum;
}

template <class T, class To, bool kPairs>
void reorder_row(const Reordering& f, int64_t row, To* to) {
  const T* x = static_cast<const T*>(f.x) + row * f.stride_m;
  const int64_t per_group = f.group_sums ? f.group / kLaneCodes : 0;
  float group_sum = 0;
  for (int64_t lane = 0; lane < f.lanes; lane += kLanes) {
    const int count = int(lesser(kLanes, f.lanes - lane));
    float sums[kLanes];
    bool whole = false;
#if FT_BF16_DOT
    if constexpr (kPairs)
      if (f.stride_k == 1 && !f.perm && (lane + kLanes) * kLaneCodes <= f.k) {
        store(sums, reorder_block(x + lane * kLaneCodes, f.order, f.lane_sums || f.group_sums,
                                  to + lane / kLanes * f.order.block));
        whole = true;
      }
#endif
    for (int i = 0; i < count && !whole; ++i)
      sums[i] = reorder_lane<T, To, kPairs>(f, x, lane + i, to);
    if (f.lane_sums)
      memcpy(f.lane_sums + row * f.lanes + lane, sums, size_t(count) * sizeof(float));
    if (!f.group_sums) continue;
    for (int i = 0; i < count; ++i) {
      const int64_t at = lane + i;
      group_sum += sums[i];
      if ((at + 1) % per_group != 0 && (at + 1) * kLaneCodes < f.k) continue;
      if (at * kLaneCodes < f.k) f.group_sums[row * f.groups + at / per_group] = group_sum;
      group_sum = 0;
    }
  }
}

template <class T, class To, bool kPairs>
void reorder(const Reordering& f, int64_t m, To* to, int threads) {
  parallel_for(m * f.k < kSerialWork ? 1 : threads, m, [&](int64_t row, int) {
    reorder_row<T, To, kPairs>(f, row, to + row * f.lanes * kLaneCodes);
  });
}

template <class T>
void gather(const Reordering& f, int64_t m, T* to, int threads) {
  parallel_for(m * f.k < kSerialWork ? 1 : threads, m, [&](int64_t row, int) {
    const T* x = static_cast<const T*>(f.x) + row * f.stride_m;
    for (int64_t j = 0; j < f.k; ++j) to[row * f.k + j] = x[f.perm[j] * f.stride_k];
  });
}

// x (m, k) with the features in the order of the codes.
inline Operand gathered(const Int4Call& f) {
  if (!f.w.perm) return dense(f.x, f.x_stride_m, f.x_stride_k);
  const int64_t values = f.m * f.w.k;
  void* const to = scratch(Scratch::kOrdered, (values + 1) * element_bytes(f.dtype));
  const Reordering by{f.x, f.x_stride_m, f.x_stride_k, f.w.perm, f.w.k, 0,
                      {},  nullptr,      nullptr,      0,        0};
  if (f.dtype == FT_FLOAT32)
    gather(by, f.m, static_cast<float*>(to), f.threads);
  else
    gather(by, f.m, static_cast<uint16_t*>(to), f.threads);
  return dense(to, f.w.k, 1);
}

// ---- products ------------------------------------------------------------------------------

// A weight whose only group is lengthened to whole vectors of codes.
inline Int4Weight in_whole_blocks(Int4Weight w) {
  if (w.groups == 1) w.group = ceil_div(w.group, kBlockCodes) * kBlockCodes;
  return w;
}

// x W^T as a product of the core. It points into itself: make one and leave it where it is.
struct ForwardProduct {
  Int4Columns columns;
  Groups groups;
  Product sum;

  explicit ForwardProduct(const Int4Call& f) : columns{in_whole_blocks(f.w), nullptr, 0, 1} {
    const Int4Weight& w = columns.w;
    const bool whole_lanes = w.group % kLaneCodes == 0;
    const bool pairs = FT_BF16_DOT && f.dtype == FT_BFLOAT16 && whole_lanes;
    const bool few_rows = f.m <= kFewRows && whole_lanes;
    Operand codes = dense(&columns, 0, 0);
    codes.used_once = true;
    codes.pack = pack_weights;
    if (few_rows) codes.multiply = choose_codes_in_place(w, pairs);
#if FT_BF16_DOT
    if (pairs) {
      codes.pack = pack_pairs;
      columns.pairs = pair_table(w);
      if (!few_rows && w.group % kBlockCodes == 0) columns.parts = w.group / kBlockCodes;
    }
#endif
    if (!pairs && !few_rows) {
      sum = product(gathered(f), f.dtype, codes, FT_FLOAT32, w.k, kWeightItems);
      return;
    }
    const int64_t lanes =
        ceil_div(w.k, few_rows ? kBlockCodes : kLaneCodes) * (few_rows ? kLanes : 1);
    const int64_t values = lanes * kLaneCodes, items = pairs ? values / 2 : values;
    const int32_t dtype = pairs ? FT_BFLOAT16 : FT_FLOAT32;
    const Operand x = ordered(f, lanes, few_rows, pairs);
    sum = product(x, dtype, codes, dtype, values,
                  few_rows ? greater(1, lesser(items, kMostRowItems)) : kDepthItems);
#if FT_BF16_DOT
    if (pairs && few_rows) sum.scale = 1.0f / kPairFactors[w.codebook];
    if (pairs && !few_rows) {
      const bool within_blocks = kBlockCodes % part() == 0;
      groups = {part() / 2, read_groups_of, &columns,
                row_sums,   parts_of_row(), within_blocks ? choose_code_tile : nullptr};
      sum.groups = &groups;
    }
#endif
  }
  ForwardProduct(const ForwardProduct&) = delete;

 private:
  float* row_sums = nullptr;

  int64_t part() const { return columns.w.group / columns.parts; }
  int64_t parts_of_row() const { return ceil_div(columns.w.k, part()); }

  Operand ordered(const Int4Call& f, int64_t lanes, bool few_rows, bool pairs) {
    const bool zeros = columns.w.zero_kind != FT_ZERO_NONE;
    const int64_t values = lanes * kLaneCodes, rows = few_rows ? kFewRows : f.m;
    const int64_t sums_of_row = few_rows ? lanes : parts_of_row();
    if (zeros) {
      const int64_t floats = rows * sums_of_row;
      row_sums =
          static_cast<float*>(scratch(Scratch::kSums, (floats + 1) * int64_t(sizeof(float))));
      // Rows that fill a tile up are multiplied too.
      for (int64_t i = f.m * sums_of_row; i < floats; ++i) row_sums[i] = 0.0f;
      if (few_rows) {
        columns.lane_sums = row_sums;
        columns.lane_sums_stride = sums_of_row;
      }
    }
    const LaneOrder order = !few_rows ? kInLanes : pairs ? kInVectors<true> : kInVectors<false>;
    const Reordering by{f.x,
                        f.x_stride_m,
                        f.x_stride_k,
                        columns.w.perm,
                        columns.w.k,
                        lanes,
                        order,
                        few_rows ? row_sums : nullptr,
                        few_rows ? nullptr : row_sums,
                        part(),
                        parts_of_row()};
    const int64_t row_bytes = values * (pairs ? 2 : 4);
    char* const to = static_cast<char*>(scratch(Scratch::kOrdered, rows * row_bytes + 4));
    if (rows > f.m) memset(to + f.m * row_bytes, 0, size_t((rows - f.m) * row_bytes));
    if (pairs)
      reorder<bf16, bf16, true>(by, f.m, reinterpret_cast<bf16*>(to), f.threads);
    else if (f.dtype == FT_FLOAT32)
      reorder<float, float, false>(by, f.m, reinterpret_cast<float*>(to), f.threads);
    else if (f.dtype == FT_BFLOAT16)
      reorder<bf16, float, false>(by, f.m, reinterpret_cast<float*>(to), f.threads);
    else
      reorder<fp16, float, false>(by, f.m, reinterpret_cast<float*>(to), f.threads);
    Operand x = dense(to, values, 1);
    x.in_order = few_rows;
    return x;
  }
};

// dY W as a product of the core; it points to `columns`.
inline Product dx_product(const Int4Call& f, const Int4Columns& columns) {
  const bool pairs = FT_BF16_DOT && f.dtype == FT_BFLOAT16;
  Operand codes = dense(&columns, 0, 0);
  codes.used_once = true;
  codes.short_runs = true;
  codes.pack = pairs ? pack_weights_across<FT_BF16_DOT> : pack_weights_across<false>;
  return product(dense(f.grad, f.grad_stride_m, f.grad_stride_n), f.dtype, codes,
                 pairs ? FT_BFLOAT16 : FT_FLOAT32, f.w.n);
}

// ---- the gradients of scale and zero -------------------------------------------------------

inline void write_scale_dtype(const Int4Weight& w, void* to, int64_t at, double value) {
  if (w.scale_dtype == FT_FLOAT32)
    static_cast<float*>(to)[at] = float(value);
  else
    static_cast<bf16*>(to)[at] = to_bf16(float(value));
}

// Of row n, whose D is given in the order of the codes.
inline void grid_gradients_of_row(const Int4Call& f, int64_t n, const float* d) {
  const Int4Weight& w = f.w;
  const uint8_t* codes = w.codes + n * w.row_bytes;
  for (int64_t g = 0; g < w.groups; ++g) {
    const double zero = zero_of(w, n, g);
    double along = 0, plain = 0;
    for (int64_t j = g * w.group; j < lesser(w.k, (g + 1) * w.group); ++j) {
      along += d[j] * (kCodebooks[w.codebook][codes[j / 2] >> j % 2 * 4 & 15] - zero);
      plain += d[j];
    }
    if (f.dscale) write_scale_dtype(w, f.dscale, n * w.groups + g, along);
    if (f.dzero) write_scale_dtype(w, f.dzero, n * w.groups + g, -scale_of(w, n, g) * plain);
  }
}

inline void grid_gradients(const Int4Call& f) {
  const int64_t k = f.w.k;
  const Operand x = gathered(f);
  const Operand x_t = dense(x.data, x.depth_stride, x.line_stride);
  float* const d = static_cast<float*>(
      scratch(Scratch::kGradient, (kRowsAtOnce * k + 1) * int64_t(sizeof(float))));
  for (int64_t n = 0; n < f.w.n; n += kRowsAtOnce) {
    const int64_t rows = lesser(kRowsAtOnce, f.w.n - n);
    const void* grad = advanced(f.grad, f.dtype, n * f.grad_stride_n);
    const Product sum =
        product(dense(grad, f.grad_stride_n, f.grad_stride_m), f.dtype, x_t, f.dtype, f.m);
    gemm(rows, k, &sum, 1, result(d, FT_FLOAT32, k, 1), f.threads);
    parallel_for(rows * k < kSerialWork ? 1 : f.threads, rows,
                 [&](int64_t row, int) { grid_gradients_of_row(f, n + row, d + row * k); });
  }
}

// ---- the ops -------------------------------------------------------------------------------

inline void int4_forward(const Int4Call& f) {
  const ScratchScope scope;
  const ForwardProduct base(f);
  Result y = result(f.y, f.dtype, f.w.n, 1);
  y.bias = f.bias;
  gemm(f.m, f.w.n, &base.sum, 1, y, f.threads);
}

inline void int4_backward(const Int4Call& f) {
  const ScratchScope scope;
  if (f.dx) {
    const Int4Columns columns{f.w, nullptr, 0, 1};
    const Product base = dx_product(f, columns);
    gemm(f.m, f.w.k, &base, 1, result(f.dx, f.dtype, f.w.k, 1), f.threads);
  }
  if (f.dscale || f.dzero) grid_gradients(f);
  if (f.dbias)
    sum_rows(dense(f.grad, f.grad_stride_n, f.grad_stride_m), f.m, f.w.n, f.dbias, f.dtype,
             f.threads);
}

inline void int4_lora_forward(const Int4Call& f, const LoraCall& adapter) {
  const ForwardProduct base(f);
  lora_forward(adapter, &base.sum);
}

inline void int4_lora_backward(const Int4Call& f, const LoraCall& adapter) {
  const Int4Columns columns{f.w, nullptr, 0, 1};
  const Product base = dx_product(f, columns);
  if (f.dscale || f.dzero) grid_gradients(f);
  lora_backward(adapter, &base);
}

constexpr Int4Kernels kInt4{dequantize, int4_forward, int4_backward, int4_lora_forward,
                            int4_lora_backward};

}  // namespace
