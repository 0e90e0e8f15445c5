// y = x W^T + b for at most four rows of x, straight from the 4-bit codes.
//
// Bound by reading the codes once. A warp goes along four rows of W together, 512 codes of each at
// a time: 8 bytes a lane and row, four loads in flight, and the 16 elements of x that meet them are
// in registers for all four. Four warps of a block share its rows and take turns along K; two such
// sets make eight rows a block. x comes out of L1, which codes pass by only once.
//
// Codes become floats of 2^23 + c, from which 2^23 and the zero point's integer part are taken away
// at once and exactly; a lane's 16 codes have one group, and their sum is scaled. All in float32.
// Codes of a table are looked up in shared memory: 16 words in 16 banks, so lanes never meet.
//
// Sums: lane by lane into shared memory, added up in a fixed order in two passes; where the rows
// do not fill the device K is cut into parts and int4_add_partials adds those. No atomics, and the
// same bits whatever the GPU.
#include <cmath>

#include "cuda/ptq4.cuh"
#include "fastft/api.h"

namespace fastft {
namespace {

constexpr int kLaneCodes = 16;          // of a row, one after the other
constexpr int kSlab = 32 * kLaneCodes;  // codes of a row that a warp takes at a time
constexpr int kWarpRows = 4;            // rows of W that a warp goes along together
constexpr int kWarpsAlongK = 4;         // warps that share these rows
constexpr int kRowSets = kThreads / 32 / kWarpsAlongK;
constexpr int kBlockRows = kRowSets * kWarpRows;
constexpr int kLanes = 32 * kWarpsAlongK;  // that each have a part of one sum

struct alignas(8) Codes {
  uint32_t word[2];
};

// 8 bytes that are read once: they need not stay in L1, where x is.
__device__ __forceinline__ Codes load_streaming(const uint8_t* source) {
#ifdef __CUDA_ARCH__
  Codes codes;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(codes.word[0]), "=r"(codes.word[1])
               : "l"(source));
  return codes;
#else
  return *reinterpret_cast<const Codes*>(source);
#endif
}

// The lane's 16 codes of a row from k on, zeros past the row's end.
__device__ __forceinline__ Codes load_codes(const QuantizedMatrix& w, int64_t row, int64_t k,
                                            bool aligned) {
  Codes codes{};
  if (row >= w.n || k >= w.k) return codes;
  const uint8_t* source = w.codes + row * code_bytes(w.k) + k / 2;
  if (aligned && k + kLaneCodes <= w.k) {
    codes = load_streaming(source);
  } else {
#pragma unroll
    for (int i = 0; i < kLaneCodes / 2; ++i)
      if (k / 2 + i < code_bytes(w.k)) codes.word[i / 4] |= uint32_t(source[i]) << i % 4 * 8;
  }
  return codes;
}

template <class T>
struct alignas(16) Sixteen {
  T value[kLaneCodes];
};

// 16 elements of a row of x, zeros outside: what they meet there is not a number of W's.
template <class T>
__device__ __forceinline__ void load_x(const Int4Linear<T>& p, int64_t row, int64_t k,
                                       float (&x)[kLaneCodes]) {
  const T* source = p.x + row * p.x_stride_m + k;
  if (row < p.m && p.aligned && k + kLaneCodes <= p.w.k) {
    const Sixteen<T> loaded = *reinterpret_cast<const Sixteen<T>*>(source);
#pragma unroll
    for (int i = 0; i < kLaneCodes; ++i) x[i] = to_float(loaded.value[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kLaneCodes; ++i)
      x[i] = row < p.m && k + i < p.w.k ? to_float(source[i]) : 0.0f;
  }
}

// What 16 codes stand for before they are scaled.
__device__ __forceinline__ void values_of(const Codes& codes, const float* table, bool tabulated,
                                          float zero, float (&value)[kLaneCodes]) {
  const float integer = rintf(zero), rest = zero - integer;
#pragma unroll
  for (int i = 0; i < kLaneCodes; ++i) {
    const uint32_t code = codes.word[i / 8] >> i % 8 * 4 & 15u;
    value[i] = tabulated ? table[code] : biased_float(code) - (kFloatBias + integer);
  }
  if (rest != 0.0f) {
#pragma unroll
    for (int i = 0; i < kLaneCodes; ++i) value[i] -= rest;
  }
}

// kM rows of x, of which p.m are there.
template <class T, int kM>
__global__ __launch_bounds__(kThreads, kM == 1   ? 3
                                       : kM == 2 ? 2
                                                 : 1) void int4_gemv(Int4Linear<T> p) {
  constexpr int kSums = kWarpRows * kM;
  constexpr int kOutputs = kBlockRows * kM;
  constexpr int kPieces = kThreads / kOutputs;  // of the lanes of one output, in the first pass
  static_assert(kPieces * kOutputs == kThreads && kLanes % kPieces == 0, "every thread adds");
  // An odd pitch: lanes that write the same sum meet different banks.
  __shared__ float lane_sums[kThreads][kSums + 1];
  __shared__ float piece_sums[kPieces][kOutputs];
  __shared__ float table[16];

  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const uint32_t tiles = uint32_t(ceil_div<int64_t>(p.w.n, kBlockRows));
  const int64_t tile = blockIdx.x % tiles;
  const int split = int(blockIdx.x / tiles);
  const int64_t first_row = tile * kBlockRows + warp / kWarpsAlongK * kWarpRows;
  const bool tabulated = p.w.table != nullptr;
  if (tabulated && thread < 16) table[thread] = p.w.table[thread];
  __syncthreads();

  const int slabs = int(ceil_div<int64_t>(p.w.k, kSlab));
  const int per_split = ceil_div(slabs, int(p.splits));
  const int end = (split + 1) * per_split < slabs ? (split + 1) * per_split : slabs;
  float sum[kWarpRows][kM] = {};
#pragma unroll 1
  for (int slab = split * per_split + warp % kWarpsAlongK; slab < end; slab += kWarpsAlongK) {
    const int64_t k = int64_t(slab) * kSlab + lane * kLaneCodes;
    if (k >= p.w.k) continue;
    Codes codes[kWarpRows];
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) codes[r] = load_codes(p.w, first_row + r, k, p.aligned);
    float x[kM][kLaneCodes];
#pragma unroll
    for (int m = 0; m < kM; ++m) load_x(p, m, k, x[m]);
    const int64_t group = uint32_t(k) / uint32_t(p.w.group_size);
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
      if (first_row + r >= p.w.n) continue;
      const float scale = scale_of(p.w, first_row + r, group);
      float value[kLaneCodes];
      values_of(codes[r], table, tabulated, zero_of(p.w, first_row + r, group), value);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        float product = 0.0f;
#pragma unroll
        for (int i = 0; i < kLaneCodes; ++i) product += x[m][i] * value[i];
        sum[r][m] += scale * product;
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kWarpRows; ++r)
#pragma unroll
    for (int m = 0; m < kM; ++m) lane_sums[thread][r * kM + m] = sum[r][m];
  __syncthreads();
  const int output = thread % kOutputs, piece = thread / kOutputs;
  const int set = output / kSums;
  float partial = 0.0f;
#pragma unroll 4
  for (int i = 0; i < kLanes / kPieces; ++i)
    partial += lane_sums[set * kLanes + piece * (kLanes / kPieces) + i][output % kSums];
  piece_sums[piece][output] = partial;
  __syncthreads();
  if (thread >= kOutputs) return;
  float whole = 0.0f;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) whole += piece_sums[i][thread];
  const int64_t row = tile * kBlockRows + thread / kSums * kWarpRows + thread % kSums / kM;
  const int64_t m = thread % kM;
  if (row < p.w.n && m < p.m) store_sum(p, split, m, row, whole);
}

template <class T, int kM>
int launch_gemv(const char* op, void* stream, const Int4Linear<T>& p) {
  const int64_t blocks = ceil_div<int64_t>(p.w.n, kBlockRows) * p.splits;
  const int status = launch(op, stream, blocks, int4_gemv<T, kM>, p);
  return status ? status : launch_add_partials(op, stream, p);
}

}  // namespace
}  // namespace fastft

using namespace fastft;

int ft_cuda_int4_gemv(void* y, float* partials, const void* x, const uint8_t* codes,
                      const void* scale, const void* zero, const void* bias, const float* table,
                      int64_t partials_floats, int64_t m, int64_t n, int64_t k, int64_t group_size,
                      int64_t x_stride_m, int64_t splits, int32_t scale_dtype, int32_t zero_kind,
                      int32_t dtype, void* stream) {
  const char* op = "int4_gemv";
  FT_CHECK(m >= 1 && m <= 4, "%s: %lld rows, at most 4", op, static_cast<long long>(m));
  FT_CHECK(group_size % kLaneCodes == 0 || group_size >= k, "%s: groups of %lld", op,
           static_cast<long long>(group_size));
  const QuantizedMatrix w =
      quantized_matrix(codes, scale, zero, table, n, k, group_size, scale_dtype, zero_kind);
  return with_dtypes(op, dtype, dtype, [&](auto base, auto) {
    using T = typename decltype(base)::type;
    Int4Linear<T> p{};
    const int status =
        make_int4_linear(op, p, y, partials, x, bias, w, partials_floats, m, x_stride_m, splits);
    if (status) return status;
    if (m == 1) return launch_gemv<T, 1>(op, stream, p);
    if (m == 2) return launch_gemv<T, 2>(op, stream, p);
    return launch_gemv<T, 4>(op, stream, p);
  });
}
