// The five stages of the LoRA linear around a GEMM of torch's; what each computes is in api.h.
//
//   stage       product                         kernel
//   down        xa = dropout(x) A^T             row_products
//   up          y += s xa B^T                   add_product
//   up_grad     T = grad B, dB = s grad^T xa    column_products, with row products
//   down_grad   dA = s T^T dropout(x)           column_products
//   dx          dx += s dropout(T A)            add_product
//
// All are skinny products of a wide matrix (M by K or N) and a factor (R ranks): each reads or
// updates the wide matrix once and is bound by that traffic while R is small. A block takes a tile
// of it into shared memory, 16 bytes a load, regenerates the dropout mask in registers on the way
// (one call of Philox per group of eight), and multiplies it with 16 ranks of the factor in fp32
// FMAs, five to eleven for each quad read from shared memory.
// A rank above 16 takes ceil(R / 16) blocks that read the same tile at about the same time, so
// from L2; add_product loops over the ranks instead.
//
// Sums across blocks are partial results in the caller's workspace, added up in a fixed order by
// add_partials: no atomics, and the same bits whatever the GPU.
//
// A product does 2 R operations per element of the wide matrix: on an H200 (67 TFLOP/s of fp32,
// 4.8 TB/s) FMAs keep up with reading a half dtype until R = 14, float32 until R = 28. Tensor cores
// (mma of bf16 or fp16 fragments, with T rounded to them) would keep up past R = 128 and read each
// tile once for all ranks; for a rank of 16 or less they would gain little.
#include <algorithm>

#include "cuda/tile.cuh"
#include "fastft/api.h"

namespace fastft {
namespace {

constexpr int kWarps = kThreads / 32;

// xa, T and B; A.
template <class T>
using Inner = Factor<T, Layout::kRanksInner>;
template <class T>
using Outer = Factor<T, Layout::kRanksOuter>;

// ---- products of two tiles -----------------------------------------------------------------
// A lane owns the ranks (lane / 8) + 4 j, j < 4, in both.

__device__ __forceinline__ int lane() { return int(threadIdx.x) % 32; }
__device__ __forceinline__ int warp() { return int(threadIdx.x) / 32; }
__device__ __forceinline__ int lane_rank(int j) { return lane() / 8 + 4 * j; }

// sum[i][j] += the product of row (lane % 8) + 8 i of `tile` and a rank of `factor`, over the
// columns that are this warp's.
template <int kRows, int kColumns>
__device__ __forceinline__ void multiply_rows(float (&sum)[kRows / 8][4],
                                              const float (*tile)[kPitch<kColumns>],
                                              const float (*factor)[kPitch<kColumns>]) {
  constexpr int kWarpColumns = kColumns / kWarps;
#pragma unroll 1
  for (int c = 0; c < kWarpColumns; c += 4) {
    const int column = skewed(warp() * kWarpColumns + c);
    Quad b[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) b[j] = load_quad(&factor[lane_rank(j)][column]);
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      const Quad a = load_quad(&tile[lane() % 8 + 8 * i][column]);
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[i][j] += a.value[e] * b[j].value[e];
    }
  }
}

// sum[i][j] += the product of column first + i of `tile`, first = 32 warp + 4 (lane % 8), and a
// rank of `factor`, over the tile's rows.
template <int kRows, int kColumns>
__device__ __forceinline__ void multiply_columns(float (&sum)[4][4],
                                                 const float (*tile)[kPitch<kColumns>],
                                                 const float (*factor)[kPitch<kRows>]) {
  static_assert(kColumns == 32 * kWarps, "four columns for each lane of eight");
  const int column = skewed(warp() * 32 + lane() % 8 * 4);
#pragma unroll 1
  for (int row = 0; row < kRows; row += 4) {
    Quad b[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) b[j] = load_quad(&factor[lane_rank(j)][skewed(row)]);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const Quad a = load_quad(&tile[row + e][column]);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += a.value[i] * b[j].value[e];
    }
  }
}

// The sums of multiply_rows differ from warp to warp by the columns they cover. Store them side by
// side; after a barrier sum_of_warps adds those of one output.
template <int kRows>
__device__ __forceinline__ void store_warp_sums(float (*sums)[kRows * kRanks],
                                                const float (&sum)[kRows / 8][4]) {
#pragma unroll
  for (int i = 0; i < kRows / 8; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      sums[warp()][(lane() % 8 + 8 * i) * kRanks + lane_rank(j)] = sum[i][j];
}

template <int kRows>
__device__ __forceinline__ float sum_of_warps(const float (*sums)[kRows * kRanks], int output) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += sums[w][output];
  return sum;
}

// ---- down ----------------------------------------------------------------------------------

constexpr int kDownRows = 32, kDownColumns = 128;  // the tile of row_products

// out (m, r) = dropout(input) factor. A block takes kRows rows, all their columns, and one tile of
// ranks.
template <class T, class A>
__global__ void __launch_bounds__(kThreads, 2)
    row_products(A* out, Wide<const T> input, Outer<A> factor, const int64_t* rng,
                 uint32_t threshold) {
  constexpr int kRows = kDownRows, kColumns = kDownColumns;
  alignas(16) __shared__ float tile[kRows][kPitch<kColumns>];
  alignas(16) __shared__ float ranks[kRanks][kPitch<kColumns>];
  __shared__ float sums[kWarps][kRows * kRanks];

  const Dropout dropout = make_dropout(rng, threshold);
  const int64_t rank_tiles = ceil_div<int64_t>(factor.ranks, kRanks);
  const int64_t row = blockIdx.x / rank_tiles * kRows, rank = blockIdx.x % rank_tiles * kRanks;

  WideTile<T, kRows, kColumns> next_tile;
  FactorTile<A, Layout::kRanksOuter, kColumns> next_ranks;
  next_tile.load(input, row, 0);
  next_ranks.load(factor, 0, rank);
  float sum[kRows / 8][4] = {};
  for (int64_t column = 0; column < input.columns; column += kColumns) {
    next_tile.store(tile, dropout, input, row, column);
    next_ranks.store(ranks);
    __syncthreads();
    next_tile.load(input, row, column + kColumns);
    next_ranks.load(factor, column + kColumns, rank);
    multiply_rows<kRows, kColumns>(sum, tile, ranks);
    __syncthreads();
  }

  store_warp_sums<kRows>(sums, sum);
  __syncthreads();
  for (int output = int(threadIdx.x); output < kRows * kRanks; output += kThreads) {
    const int64_t i = row + output / kRanks, j = rank + output % kRanks;
    if (i < input.rows && j < factor.ranks)
      out[i * factor.ranks + j] = from_float<A>(dropout.scale * sum_of_warps<kRows>(sums, output));
  }
}

// ---- up_grad, down_grad --------------------------------------------------------------------

constexpr int kGradRows = 16, kGradColumns = 256;  // the tile of column_products
constexpr int64_t kWantedBlocks = 256;             // about two for each multiprocessor

// How the rows are shared out: a function of the shape alone, so that the bits are too.
struct RowChunks {
  int64_t rows, count;
};

RowChunks row_chunks(int64_t m, int64_t columns, int64_t r) {
  const int64_t tiles = ceil_div<int64_t>(columns, kGradColumns) * ceil_div<int64_t>(r, kRanks);
  const int64_t wanted = tiles ? std::max<int64_t>(kWantedBlocks / tiles, 1) : 1;
  const int64_t rows = ceil_div(ceil_div(m, wanted), int64_t(kGradRows)) * kGradRows;
  return {rows, rows ? ceil_div(m, rows) : 0};
}

// Where column_products writes: for each chunk of rows a matrix whose element (column, rank)
// stands at column * stride + rank * rank_stride, in the output's own layout.
struct ColumnPartials {
  float* data;  // null: not computed
  int64_t stride, rank_stride;
};

// One pass over the input: the products of its columns with row_factor (m, r), a partial result
// per chunk of rows, and where kRowProducts those of its rows with column_factor (columns, r), a
// partial result (m, r) per tile of columns. A block takes one chunk, one tile of columns and one
// of ranks.
template <class T, class Q, class P, bool kRowProducts>
__global__ void __launch_bounds__(kThreads, 2)
    column_products(ColumnPartials column_partials, float* row_partials, Wide<const T> input,
                    Inner<Q> row_factor, Inner<P> column_factor, int64_t chunk_rows,
                    const int64_t* rng, uint32_t threshold) {
  constexpr int kRows = kGradRows, kColumns = kGradColumns;
  alignas(16) __shared__ float tile[kRows][kPitch<kColumns>];
  alignas(16) __shared__ float row_ranks[kRanks][kPitch<kRows>];
  alignas(16) __shared__ float column_ranks[kRowProducts ? kRanks : 1][kPitch<kColumns>];
  __shared__ float sums[kRowProducts ? kWarps : 1][kRows * kRanks];

  const Dropout dropout = make_dropout(rng, threshold);
  const int64_t r = row_factor.ranks;
  const int64_t rank_tiles = ceil_div<int64_t>(r, kRanks);
  const int64_t column_tiles = ceil_div<int64_t>(input.columns, kColumns);
  const int64_t rank = blockIdx.x % rank_tiles * kRanks;
  const int64_t column_tile = blockIdx.x / rank_tiles % column_tiles;
  const int64_t chunk = blockIdx.x / rank_tiles / column_tiles;
  const int64_t column = column_tile * kColumns;
  const int64_t begin = chunk * chunk_rows;
  const int64_t end = begin + chunk_rows < input.rows ? begin + chunk_rows : input.rows;

  if constexpr (kRowProducts) {
    FactorTile<P, Layout::kRanksInner, kColumns> constant;
    constant.load(column_factor, column, rank);
    constant.store(column_ranks);
  }
  WideTile<T, kRows, kColumns> next_tile;
  FactorTile<Q, Layout::kRanksInner, kRows> next_ranks;
  next_tile.load(input, begin, column);
  next_ranks.load(row_factor, begin, rank);
  float column_sum[4][4] = {};
  for (int64_t row = begin; row < end; row += kRows) {
    next_tile.store(tile, dropout, input, row, column);
    next_ranks.store(row_ranks);
    __syncthreads();
    next_tile.load(input, row + kRows, column);
    next_ranks.load(row_factor, row + kRows, rank);
    if constexpr (kRowProducts) {
      float row_sum[kRows / 8][4] = {};
      multiply_rows<kRows, kColumns>(row_sum, tile, column_ranks);
      store_warp_sums<kRows>(sums, row_sum);
    }
    if (column_partials.data) multiply_columns<kRows, kColumns>(column_sum, tile, row_ranks);
    __syncthreads();
    if constexpr (kRowProducts) {
      static_assert(kRows * kRanks == kThreads, "one output for each thread");
      const int64_t i = row + threadIdx.x / kRanks, j = rank + threadIdx.x % kRanks;
      if (i < end && j < r)
        row_partials[(column_tile * input.rows + i) * r + j] =
            sum_of_warps<kRows>(sums, int(threadIdx.x));
    }
  }

  if (!column_partials.data) return;
  float* target = column_partials.data + chunk * input.columns * r;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t c = column + warp() * 32 + lane() % 8 * 4 + i, k = rank + lane_rank(j);
      if (c < input.columns && k < r)
        target[c * column_partials.stride + k * column_partials.rank_stride] =
            dropout.scale * column_sum[i][j];
    }
}

// ---- sums of partial results ---------------------------------------------------------------

// out[i] = s * the sum over c of partials[c][i], i < size, c in order; s = 1 where it is null.
template <class Out>
__global__ void __launch_bounds__(kThreads)
    add_partials(Out* out, const float* partials, const float* scaling, int64_t size,
                 int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t c = 0; c < count; ++c) sum += partials[c * size + i];
  out[i] = from_float<Out>(scaling ? *scaling * sum : sum);
}

template <class Out>
int launch_add_partials(const char* op, void* stream, Out* out, const float* partials,
                        const float* scaling, int64_t size, int64_t count) {
  return launch(op, stream, ceil_div<int64_t>(size, kThreads), add_partials<Out>, out, partials,
                scaling, size, count);
}

constexpr int64_t kDotBlocks = 64;  // at most

// partials[block] = the block's share of sum(t * xa), in float64: much may cancel on the way to one
// number.
template <class A>
__global__ void __launch_bounds__(kThreads)
    dot(float* partials, const float* t, const A* xa, int64_t size) {
  __shared__ double sums[kThreads];
  double sum = 0.0;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < size;
       i += int64_t(gridDim.x) * kThreads)
    sum += double(t[i]) * double(to_float(xa[i]));
  sums[threadIdx.x] = sum;
  for (unsigned width = kThreads / 2; width; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) sums[threadIdx.x] += sums[threadIdx.x + width];
  }
  if (threadIdx.x == 0) partials[blockIdx.x] = float(sums[0]);
}

// ---- up, dx --------------------------------------------------------------------------------

constexpr int kSumRows = 32, kSumColumns = 256;  // the tile of add_product

// out += s * dropout(row_factor column_factor^T). A thread owns four rows of eight columns, which
// it loads before the product, to have them in flight: of float32 that is as much with one block
// for each multiprocessor as with two of a half dtype, whose registers then suffice.
template <class T, class Q, class P, Layout layout>
__global__ void __launch_bounds__(kThreads, 4 / sizeof(T))
    add_product(Wide<T> out, Inner<Q> row_factor, Factor<P, layout> column_factor,
                const float* scaling, const int64_t* rng, uint32_t threshold) {
  constexpr int kRows = kSumRows, kColumns = kSumColumns, kRowsPerThread = kRows / kWarps;
  static_assert(kColumns == 32 * kGroup && kRowsPerThread == 4, "a quad by a group per thread");
  alignas(16) __shared__ float row_ranks[kRanks][kPitch<kRows>];
  alignas(16) __shared__ float column_ranks[kRanks][kPitch<kColumns>];

  const int64_t column_tiles = ceil_div<int64_t>(out.columns, kColumns);
  const int64_t first_row = blockIdx.x / column_tiles * kRows;
  const int64_t first_column = blockIdx.x % column_tiles * kColumns;
  const int tile_row = warp() * kRowsPerThread, tile_column = lane() * kGroup;
  const int64_t row = first_row + tile_row, column = first_column + tile_column;

  const Wide<const T> in{out.data, out.rows, out.columns, out.stride, out.aligned};
  Group<T> group[kRowsPerThread];
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) group[i] = load_group(in, row + i, column);

  float sum[kRowsPerThread][kGroup] = {};
  for (int64_t rank = 0; rank < row_factor.ranks; rank += kRanks) {
    FactorTile<Q, Layout::kRanksInner, kRows> rows;
    FactorTile<P, layout, kColumns> columns;
    rows.load(row_factor, first_row, rank);
    columns.load(column_factor, first_column, rank);
    rows.store(row_ranks);
    columns.store(column_ranks);
    __syncthreads();
#pragma unroll 2
    for (int j = 0; j < kRanks; ++j) {
      const Quad a = load_quad(&row_ranks[j][skewed(tile_row)]);
      const Quad b[2] = {load_quad(&column_ranks[j][skewed(tile_column)]),
                         load_quad(&column_ranks[j][skewed(tile_column) + 4])};
#pragma unroll
      for (int i = 0; i < kRowsPerThread; ++i)
#pragma unroll
        for (int e = 0; e < kGroup; ++e) sum[i][e] += a.value[i] * b[e / 4].value[e % 4];
    }
    __syncthreads();
  }

  const Dropout dropout = make_dropout(rng, threshold);
  const float scale = *scaling * dropout.scale;
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
    const uint32_t keep = keep_bits(dropout, (row + i) * out.columns + column);
#pragma unroll
    for (int e = 0; e < kGroup; ++e)
      if (keep >> e & 1u)
        group[i].set(e, from_float<T>(to_float(group[i].get(e)) + scale * sum[i][e]));
    store_group(out, row + i, column, group[i]);
  }
}

template <class T, class Q, class P, Layout layout>
int launch_add_product(const char* op, void* stream, const Wide<T>& out, const Inner<Q>& row_factor,
                       const Factor<P, layout>& column_factor, const float* scaling,
                       const int64_t* rng, uint32_t threshold) {
  const int64_t blocks =
      ceil_div<int64_t>(out.rows, kSumRows) * ceil_div<int64_t>(out.columns, kSumColumns);
  return launch(op, stream, blocks, add_product<T, Q, P, layout>, out, row_factor, column_factor,
                scaling, rng, threshold);
}

}  // namespace
}  // namespace fastft

using namespace fastft;

int ft_cuda_lora_down(void* xa, const void* x, const void* lora_a, const int64_t* rng, int64_t m,
                      int64_t k, int64_t r, int64_t x_stride_m, uint32_t threshold, int32_t dtype,
                      int32_t adapter_dtype, void* stream) {
  return with_dtypes("lora_down", dtype, adapter_dtype, [&](auto base, auto adapter) {
    using T = typename decltype(base)::type;
    using A = typename decltype(adapter)::type;
    const int64_t blocks = ceil_div<int64_t>(m, kDownRows) * ceil_div<int64_t>(r, kRanks);
    return launch("lora_down", stream, blocks, row_products<T, A>, static_cast<A*>(xa),
                  wide(static_cast<const T*>(x), m, k, x_stride_m),
                  Outer<A>{static_cast<const A*>(lora_a), k, r}, rng, threshold);
  });
}

int ft_cuda_lora_up(void* y, const void* xa, const void* lora_b, const float* scaling, int64_t m,
                    int64_t n, int64_t r, int32_t dtype, int32_t adapter_dtype, void* stream) {
  return with_dtypes("lora_up", dtype, adapter_dtype, [&](auto base, auto adapter) {
    using T = typename decltype(base)::type;
    using A = typename decltype(adapter)::type;
    return launch_add_product("lora_up", stream, wide(static_cast<T*>(y), m, n, n),
                              Inner<A>{static_cast<const A*>(xa), m, r},
                              Inner<A>{static_cast<const A*>(lora_b), n, r}, scaling, nullptr, 0);
  });
}

int ft_cuda_lora_up_grad_workspace(int64_t* floats, int64_t m, int64_t n, int64_t r) {
  *floats =
      ceil_div<int64_t>(n, kGradColumns) * m * r + row_chunks(m, n, r).count * n * r + kDotBlocks;
  return 0;
}

int ft_cuda_lora_up_grad(float* t, void* dlora_b, float* dscaling, float* workspace,
                         const void* grad, const void* xa, const void* lora_b, const float* scaling,
                         int64_t workspace_floats, int64_t m, int64_t n, int64_t r,
                         int64_t grad_stride_m, int32_t dtype, int32_t adapter_dtype,
                         void* stream) {
  const char* op = "lora_up_grad";
  int64_t needed;
  ft_cuda_lora_up_grad_workspace(&needed, m, n, r);
  FT_CHECK(workspace_floats >= needed, "%s: a workspace of %lld floats, %lld needed", op,
           static_cast<long long>(workspace_floats), static_cast<long long>(needed));
  const int64_t column_tiles = ceil_div<int64_t>(n, kGradColumns);
  const RowChunks chunks = row_chunks(m, n, r);
  float* t_partials = workspace;
  float* dlora_b_partials = t_partials + column_tiles * m * r;
  float* dot_partials = dlora_b_partials + chunks.count * n * r;

  return with_dtypes(op, dtype, adapter_dtype, [&](auto base, auto adapter) {
    using T = typename decltype(base)::type;
    using A = typename decltype(adapter)::type;
    const A* s = static_cast<const A*>(xa);
    int status =
        launch(op, stream, chunks.count * column_tiles * ceil_div<int64_t>(r, kRanks),
               column_products<T, A, A, true>,
               ColumnPartials{dlora_b ? dlora_b_partials : nullptr, r, 1}, t_partials,
               wide(static_cast<const T*>(grad), m, n, grad_stride_m), Inner<A>{s, s ? m : 0, r},
               Inner<A>{static_cast<const A*>(lora_b), n, r}, chunks.rows, nullptr, 0);
    if (!status)
      status = launch_add_partials(op, stream, t, t_partials, nullptr, m * r, column_tiles);
    if (!status && dlora_b)
      status = launch_add_partials(op, stream, static_cast<A*>(dlora_b), dlora_b_partials, scaling,
                                   n * r, chunks.count);
    if (!status && dscaling) {
      const int64_t blocks = std::min(ceil_div<int64_t>(m * r, kThreads), kDotBlocks);
      status = launch(op, stream, blocks, dot<A>, dot_partials, t, s, m * r);
      if (!status)
        status = launch_add_partials(op, stream, dscaling, dot_partials, nullptr, 1, blocks);
    }
    return status;
  });
}

int ft_cuda_lora_down_grad_workspace(int64_t* floats, int64_t m, int64_t k, int64_t r) {
  *floats = row_chunks(m, k, r).count * k * r;
  return 0;
}

int ft_cuda_lora_down_grad(void* dlora_a, float* workspace, const float* t, const void* x,
                           const float* scaling, const int64_t* rng, int64_t workspace_floats,
                           int64_t m, int64_t k, int64_t r, int64_t x_stride_m, uint32_t threshold,
                           int32_t dtype, int32_t adapter_dtype, void* stream) {
  const char* op = "lora_down_grad";
  const RowChunks chunks = row_chunks(m, k, r);
  const int64_t needed = chunks.count * k * r;
  FT_CHECK(workspace_floats >= needed, "%s: a workspace of %lld floats, %lld needed", op,
           static_cast<long long>(workspace_floats), static_cast<long long>(needed));
  const int64_t blocks =
      chunks.count * ceil_div<int64_t>(k, kGradColumns) * ceil_div<int64_t>(r, kRanks);
  return with_dtypes(op, dtype, adapter_dtype, [&](auto base, auto adapter) {
    using T = typename decltype(base)::type;
    using A = typename decltype(adapter)::type;
    const int status = launch(op, stream, blocks, column_products<T, float, float, false>,
                              ColumnPartials{workspace, 1, k}, nullptr,
                              wide(static_cast<const T*>(x), m, k, x_stride_m),
                              Inner<float>{t, m, r}, Inner<float>{}, chunks.rows, rng, threshold);
    if (status) return status;
    return launch_add_partials(op, stream, static_cast<A*>(dlora_a), workspace, scaling, r * k,
                               chunks.count);
  });
}

int ft_cuda_lora_dx(void* dx, const float* t, const void* lora_a, const float* scaling,
                    const int64_t* rng, int64_t m, int64_t k, int64_t r, uint32_t threshold,
                    int32_t dtype, int32_t adapter_dtype, void* stream) {
  return with_dtypes("lora_dx", dtype, adapter_dtype, [&](auto base, auto adapter) {
    using T = typename decltype(base)::type;
    using A = typename decltype(adapter)::type;
    return launch_add_product("lora_dx", stream, wide(static_cast<T*>(dx), m, k, k),
                              Inner<float>{t, m, r}, Outer<A>{static_cast<const A*>(lora_a), k, r},
                              scaling, rng, threshold);
  });
}
