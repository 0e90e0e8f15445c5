// Columns of W from its 4-bit codes, in any dtype: what a panel goes through on its way to a GEMM
// of torch's, and the op int4_dequantize.
//
// A thread makes eight consecutive elements of a row out of four bytes: 16 bytes written at once in
// a half dtype, 32 in float32. Bound by those writes. Where rows do not begin at such addresses, or
// a permutation scatters them, elements go one by one.
//
// Numerics: code - zero, then that times scale, each rounded to float32; one rounding to the dtype.
#include "cuda/ptq4.cuh"
#include "cuda/tile.cuh"
#include "fastft/api.h"

namespace fastft {
namespace {

constexpr int kElements = kGroup;  // of a thread

// Eight values of a row; those beyond its end are of codes 0, whose scale may be any.
__device__ __forceinline__ void read_elements(const QuantizedMatrix& w, int64_t row, int64_t column,
                                              bool aligned, float (&value)[kElements]) {
  const uint8_t* codes = w.codes + row * code_bytes(w.k) + column / 2;
  uint32_t word = 0;
  if (aligned && column + kElements <= w.k) {
    word = *reinterpret_cast<const uint32_t*>(codes);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (column / 2 + i < code_bytes(w.k)) word |= uint32_t(codes[i]) << 8 * i;
  }
  // One division, in 32 bits; from there on the next group is where the last one ends.
  int64_t group = uint32_t(column) / uint32_t(w.group_size);
  int64_t next = (group + 1) * w.group_size;
  float scale = scale_of(w, row, group), zero = zero_of(w, row, group);
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    if (column + i == next && next < w.k) {
      next += w.group_size;
      scale = scale_of(w, row, ++group);
      zero = zero_of(w, row, group);
    }
    const uint32_t code = word >> 4 * i & 15u;
    value[i] = (w.table ? w.table[code] : code_float(code) - zero) * scale;
  }
}

// weight (n, columns): those from first_column, an even one, on.
template <class T>
__global__ __launch_bounds__(kThreads, 4) void int4_dequantize(T* weight, QuantizedMatrix w,
                                                               const int32_t* perm,
                                                               int64_t first_column,
                                                               int64_t columns, bool aligned) {
  const int64_t per_row = ceil_div<int64_t>(columns, kElements);
  const int64_t place = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool narrow = place <= UINT32_MAX;  // a division in 64 bits costs as much as all the rest
  const int64_t row = narrow ? uint32_t(place) / uint32_t(per_row) : place / per_row;
  const int64_t in_row = (place - row * per_row) * kElements;
  const int64_t column = first_column + in_row, end = first_column + columns;
  if (row >= w.n) return;
  float value[kElements];
  read_elements(w, row, column, aligned, value);
  Group<T> group{};
#pragma unroll
  for (int i = 0; i < kElements; ++i) group.set(i, from_float<T>(value[i]));
  T* target = weight + row * columns;
  if (!perm && aligned && column + kElements <= end) {
    *reinterpret_cast<Group<T>*>(target + in_row) = group;
    return;
  }
#pragma unroll
  for (int i = 0; i < kElements; ++i)
    if (column + i < end) {
      const int64_t place = perm ? int64_t(perm[column + i]) : in_row + i;
      // Nobody else looks into perm: what is no column is left out, not written elsewhere.
      if (place >= 0 && place < columns) target[place] = group.get(i);
    }
}

}  // namespace
}  // namespace fastft

using namespace fastft;

int ft_cuda_int4_dequantize(void* weight, const uint8_t* codes, const void* scale, const void* zero,
                            const int32_t* perm, const float* table, int64_t n, int64_t k,
                            int64_t group_size, int64_t first_column, int64_t columns,
                            int32_t scale_dtype, int32_t zero_kind, int32_t dtype, void* stream) {
  const char* op = "int4_dequantize";
  FT_CHECK(group_size > 0, "%s: no group size", op);
  FT_CHECK(first_column >= 0 && first_column % 2 == 0 && columns <= k - first_column &&
               (!perm || columns == k),
           "%s: columns %lld to %lld of %lld", op, static_cast<long long>(first_column),
           static_cast<long long>(first_column + columns), static_cast<long long>(k));
  const QuantizedMatrix w =
      quantized_matrix(codes, scale, zero, table, n, k, group_size, scale_dtype, zero_kind);
  const int64_t blocks = ceil_div<int64_t>(n * ceil_div<int64_t>(columns, kElements), kThreads);
  return with_dtypes(op, dtype, dtype, [&](auto base, auto) {
    using T = typename decltype(base)::type;
    const bool aligned = reinterpret_cast<uintptr_t>(weight) % 16 == 0 &&
                         reinterpret_cast<uintptr_t>(codes) % 4 == 0 && code_bytes(k) % 4 == 0 &&
                         columns % kElements == 0 && first_column % kElements == 0;
    return launch(op, stream, blocks, int4_dequantize<T>, static_cast<T*>(weight), w, perm,
                  first_column, columns, aligned);
  });
}
