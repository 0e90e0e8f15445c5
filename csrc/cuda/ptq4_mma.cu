// y = x W^T + b for up to 64 rows of x, straight from the 4-bit codes, on tensor cores.
//
// Bound by reading the codes once. A block owns 128 rows of W and a part of K, and goes along K by
// 128: codes and x come through asynchronous copies, four stages deep. Four warps have 32 rows
// each, and four more the same rows in the other half of every 128. W is the operand with 16 rows,
// so no code is unpacked twice and x may have as few as eight rows.
//
// mma adds over K in any order, so long as W and x agree: of 32 codes that follow each other, a
// lane takes the eight with its own t = lane % 4, one word, and the eight elements of x that they
// meet, 16 bytes. Rows stand in shared memory as in global memory; their 16-byte chunks are
// permuted so that neither read meets a bank twice. Nothing is packed ahead of time.
//
// Numerics: codes are exact as 128 + c in bf16 (1024 + c in fp16), from which 128 and the zero
// point are taken away exactly; products are summed in float32 and scaled once a group. A zero
// point that is no integer is applied to the group's sum of x, which the tensor cores make of ones.
// Numbers of a table are rounded to the half dtype and looked up in pairs, one byte of codes each,
// in a copy of the 256 pairs for every lane.
//
// Sums of the halves of K meet in shared memory, those of parts in int4_add_partials, each in a
// fixed order.
#include "cuda/mma.cuh"
#include "cuda/ptq4.cuh"
#include "fastft/api.h"

namespace fastft {
namespace {

constexpr int kRows = 128;            // of W, of a block
constexpr int kDepth = 128;           // of K, of a stage
constexpr int kRun = 32;              // codes that follow each other: a chunk of 16 bytes
constexpr int kRuns = kDepth / kRun;  // of a row in a stage
constexpr int kStages = 4;
constexpr int kChunk = 16;  // bytes of an asynchronous copy
constexpr int kChunkHalves = kChunk / 2;
constexpr int kWarpsAlongRows = 4;
constexpr int kWarpRunsPerStage = kRuns / 2;
constexpr int kCodeBytes = kRows * kDepth / 2;
constexpr int kPairBytes = 256 * 32 * 4;
constexpr int kSumPitch = kRows + 4;
constexpr int kTilesBesideSumsOfX = 4;  // of x: with more, their sums have no registers left

template <int kTiles>
constexpr int kStageBytes = kCodeBytes + kTiles * 8 * kDepth * 2;

// Where a chunk of a row stands. Codes: 4 chunks a row, so eight rows of one chunk are in eight
// different quarters of the banks. x: 16 chunks a row, so neighbouring rows are in different
// halves.
__device__ __forceinline__ int code_place(int row, int chunk) {
  return (row * kRuns + (chunk ^ (row >> 1 & 3))) * kChunk;
}
__device__ __forceinline__ int x_place(int row, int chunk) {
  return (row * (kDepth / kChunkHalves) + (chunk ^ (row & 1) << 2)) * kChunk;
}

struct alignas(16) Chunk {
  uint32_t word[4];
};

// Start the copies of one stage. Past the ends of W and x it is zeros.
template <class T, int kTiles>
__device__ __forceinline__ void load_stage(const Int4Linear<T>& p, unsigned char* stage,
                                           int64_t first_row, int64_t k) {
  const int thread = int(threadIdx.x);
  const int64_t pitch = p.w.k / 2;
#pragma unroll
  for (int i = 0; i < kRows * kRuns / kThreads; ++i) {
    const int place = thread + i * kThreads, row = place / kRuns, chunk = place % kRuns;
    const int64_t byte = k / 2 + chunk * kChunk;
    const bool inside = first_row + row < p.w.n && byte < pitch;
    const uint8_t* source = p.w.codes + (inside ? (first_row + row) * pitch + byte : 0);
    copy_async(stage + code_place(row, chunk), source, inside);
  }
  constexpr int kChunks = kDepth / kChunkHalves;
#pragma unroll 1  // addresses of all at once would not fit beside 64 rows of sums
  for (int i = 0; i < kTiles * 8 * kChunks / kThreads; ++i) {
    const int place = thread + i * kThreads, row = place / kChunks, chunk = place % kChunks;
    const int64_t column = k + chunk * kChunkHalves;
    const bool inside = row < p.m && column < p.w.k;
    const T* source = p.x + (inside ? row * p.x_stride_m + column : 0);
    copy_async(stage + kCodeBytes + x_place(row, chunk), source, inside);
  }
}

// A group's scales and zero points for the four rows of W of a lane: 16 i + 8 j + lane / 4.
template <class T>
struct GroupNumbers {
  float scale[2][2];
  uint32_t zero[2][2];  // an integer one as a pair of its negative; else a float, what 8 leaves

  __device__ __forceinline__ void load(const QuantizedMatrix& w, int64_t first_row, int group,
                                       bool integer_zeros) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int64_t row = first_row + 16 * i + 8 * j;
        const bool inside = row < w.n;
        scale[i][j] = inside ? scale_of(w, row, group) : 0.0f;
        const float value = inside ? zero_of(w, row, group) : kImpliedZero;
        const uint16_t half = from_float<T>(-value).bits;
        zero[i][j] = integer_zeros ? pack_halves(half, half) : float_bits(value - kImpliedZero);
      }
  }
};

// How a kernel turns a word of eight codes into the operands of two products, and x to match.
template <class T, bool kTable>
struct Operands;

template <class T>
struct Operands<T, false> {
  bool integer_zeros;

  __device__ __forceinline__ uint32_t codes(uint32_t word, int pair, uint32_t minus_zero) const {
    const uint32_t biased = biased_pair<T>(word, pair);
    if (!integer_zeros) return add_halves<T>(biased, HalfCodes<T>::kMinusBiasAndZero);
    return add_halves<T>(add_halves<T>(biased, HalfCodes<T>::kMinusBias), minus_zero);
  }
  // The pairs of codes are i and i + 4.
  __device__ __forceinline__ uint32_t x(const Chunk& chunk, int pair) const {
    const uint32_t a = chunk.word[pair / 2], b = chunk.word[pair / 2 + 2];
    return pair % 2 ? high_halves(a, b) : low_halves(a, b);
  }
};

template <class T>
struct Operands<T, true> {
  const uint32_t* pairs;  // this lane's copy: 256 words, 32 apart

  __device__ __forceinline__ uint32_t codes(uint32_t word, int pair, uint32_t) const {
    return pairs[(word >> 8 * pair & 255u) * 32];
  }
  __device__ __forceinline__ uint32_t x(const Chunk& chunk, int pair) const {
    return chunk.word[pair];
  }
};

template <class T>
__device__ __forceinline__ void fill_pairs(uint32_t* pairs, const float* table) {
  for (int place = int(threadIdx.x); place < 256 * 32; place += kThreads) {
    const int byte = place / 32;
    pairs[place] =
        pack_halves(from_float<T>(table[byte & 15]).bits, from_float<T>(table[byte >> 4]).bits);
  }
}

// kTiles tiles of eight rows of x. sum[i][tile]: 16 rows of W by 8 of x; where an element is in a
// lane is said at mma().
template <int kTiles>
using Sums = float[2][kTiles][4];

template <class T, int kTiles>
__device__ __forceinline__ void add_group(Sums<kTiles>& total, Sums<kTiles>& sum,
                                          float (&sum_of_x)[kTiles][4],
                                          const GroupNumbers<T>& group, bool fractional_zeros) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float value = sum[i][tile][e];
        if (fractional_zeros) value -= bits_float(group.zero[i][e / 2]) * sum_of_x[tile][e];
        total[i][tile][e] += group.scale[i][e / 2] * value;
        sum[i][tile][e] = 0.0f;
      }
#pragma unroll
    for (int e = 0; e < 4; ++e) sum_of_x[tile][e] = 0.0f;
  }
}

template <class T, bool kTable, int kTiles>
__global__ __launch_bounds__(kThreads, kTiles == 2 ? 2 : 1) void int4_mma(Int4Linear<T> p) {
  FT_LAUNCH_SHARED(shared);
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int warp_row = warp % kWarpsAlongRows * 32 + lane / 4;
  const int first_run = warp / kWarpsAlongRows * kWarpRunsPerStage;
  const uint32_t tiles = uint32_t(ceil_div<int64_t>(p.w.n, kRows));
  const int64_t first_row = int64_t(blockIdx.x % tiles) * kRows;
  const int split = int(blockIdx.x / tiles);
  const bool integer_zeros = !kTable && p.w.zero_kind == FT_ZERO_UINT8;
  const bool fractional_zeros =
      !kTable && kTiles <= kTilesBesideSumsOfX && p.w.zero_kind == FT_ZERO_FLOAT;

  Operands<T, kTable> operands;
  if constexpr (kTable) {
    uint32_t* pairs = reinterpret_cast<uint32_t*>(shared + kStages * kStageBytes<kTiles>);
    fill_pairs<T>(pairs, p.w.table);
    operands.pairs = pairs + lane;
  } else {
    operands.integer_zeros = integer_zeros;
  }

  const int depths = int(ceil_div<int64_t>(p.w.k, kDepth));
  const int per_split = ceil_div(depths, int(p.splits));
  const int begin = split * per_split;
  const int end = begin + per_split < depths ? begin + per_split : depths;
  const uint32_t runs_per_group =
      uint32_t((p.w.groups > 1 ? p.w.group_size : int64_t(depths) * kDepth) / kRun);

  const auto stage_of = [&](int depth) {
    return shared + (depth - begin) % kStages * kStageBytes<kTiles>;
  };
  for (int depth = begin; depth < begin + kStages - 1; ++depth) {
    if (depth < end) load_stage<T, kTiles>(p, stage_of(depth), first_row, int64_t(depth) * kDepth);
    commit_copies();
  }

  Sums<kTiles> total = {}, sum = {};
  float sum_of_x[kTiles][4] = {};
  GroupNumbers<T> numbers;
  int group = -1;
#pragma unroll 1
  for (int depth = begin; depth < end; ++depth) {
    wait_for_copies<kStages - 2>();
    __syncthreads();
    const int ahead = depth + kStages - 1;
    if (ahead < end) load_stage<T, kTiles>(p, stage_of(ahead), first_row, int64_t(ahead) * kDepth);
    commit_copies();

    const unsigned char* stage = stage_of(depth);
#pragma unroll 1  // both at once would take the registers of another tile
    for (int r = 0; r < kWarpRunsPerStage; ++r) {
      const int run = first_run + r;
      const int run_group = int(uint32_t(depth * kRuns + run) / runs_per_group);
      if (run_group >= p.w.groups) continue;  // past the end of K
      if (run_group != group) {
        if (group >= 0) add_group<T, kTiles>(total, sum, sum_of_x, numbers, fractional_zeros);
        group = run_group;
        numbers.load(p.w, first_row + warp_row, group, integer_zeros);
      }
      uint32_t a[2][2][4];  // 16 rows, one of the two products, its four words
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int row = warp_row + 16 * i + 8 * j;
          const uint32_t word =
              *reinterpret_cast<const uint32_t*>(stage + code_place(row, run) + lane % 4 * 4);
#pragma unroll
          for (int pair = 0; pair < 4; ++pair)
            a[i][pair / 2][pair % 2 * 2 + j] = operands.codes(word, pair, numbers.zero[i][j]);
        }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const Chunk x = *reinterpret_cast<const Chunk*>(
            stage + kCodeBytes + x_place(tile * 8 + lane / 4, run * 4 + lane % 4));
#pragma unroll
        for (int product = 0; product < 2; ++product) {
          const uint32_t b0 = operands.x(x, 2 * product), b1 = operands.x(x, 2 * product + 1);
#pragma unroll
          for (int i = 0; i < 2; ++i) mma<T>(sum[i][tile], a[i][product], b0, b1);
          if (fractional_zeros) {
            constexpr uint32_t kOne = HalfCodes<T>::kOne;
            const uint32_t ones[4] = {kOne, kOne, kOne, kOne};
            mma<T>(sum_of_x[tile], ones, b0, b1);
          }
        }
      }
    }
  }
  if (group >= 0) add_group<T, kTiles>(total, sum, sum_of_x, numbers, fractional_zeros);

  // The stages are free once everybody has read them; then they hold y's tile, a row of x a line.
  __syncthreads();
  float* tile_sums = reinterpret_cast<float*>(shared);
  const auto for_each_sum = [&](auto f) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          f(tile_sums[(tile * 8 + lane % 4 * 2 + e % 2) * kSumPitch + warp_row + 16 * i +
                      e / 2 * 8],
            total[i][tile][e]);
  };
  if (first_run > 0) for_each_sum([](float& place, float value) { place = value; });
  __syncthreads();
  if (first_run == 0) for_each_sum([](float& place, float value) { place = value + place; });
  __syncthreads();
  for (int place = thread; place < kTiles * 8 * kRows; place += kThreads) {
    const int m = place / kRows, row = place % kRows;
    if (m < p.m && first_row + row < p.w.n)
      store_sum(p, split, m, first_row + row, tile_sums[m * kSumPitch + row]);
  }
}

template <class T, bool kTable, int kTiles>
int launch_mma(const char* op, void* stream, const Int4Linear<T>& p) {
  const int64_t blocks = ceil_div<int64_t>(p.w.n, kRows) * p.splits;
  constexpr int kShared = kStages * kStageBytes<kTiles> + (kTable ? kPairBytes : 0);
  static_assert(kShared <= 163 * 1024, "what a block may have on sm_80");
  const int status =
      launch_with_shared(op, stream, blocks, kShared, int4_mma<T, kTable, kTiles>, p);
  return status ? status : launch_add_partials(op, stream, p);
}

template <class T, bool kTable>
int launch_tiles(const char* op, void* stream, const Int4Linear<T>& p) {
  constexpr int kFewerRows = kTilesBesideSumsOfX * 8;
  if (!kTable && p.m > kFewerRows && p.w.zero_kind == FT_ZERO_FLOAT) {
    Int4Linear<T> first = p, rest = p;
    first.m = kFewerRows;
    rest.m = p.m - kFewerRows;
    rest.x += kFewerRows * p.x_stride_m;
    rest.y += kFewerRows * p.w.n;
    const int status = launch_tiles<T, kTable>(op, stream, first);
    return status ? status : launch_tiles<T, kTable>(op, stream, rest);
  }
  if (p.m <= 16) return launch_mma<T, kTable, 2>(op, stream, p);
  if (p.m <= 32) return launch_mma<T, kTable, 4>(op, stream, p);
  return launch_mma<T, kTable, 8>(op, stream, p);
}

}  // namespace
}  // namespace fastft

using namespace fastft;

int ft_cuda_int4_mma(void* y, float* partials, const void* x, const uint8_t* codes,
                     const void* scale, const void* zero, const void* bias, const float* table,
                     int64_t partials_floats, int64_t m, int64_t n, int64_t k, int64_t group_size,
                     int64_t x_stride_m, int64_t splits, int32_t scale_dtype, int32_t zero_kind,
                     int32_t dtype, void* stream) {
  const char* op = "int4_mma";
  FT_CHECK(m >= 1 && m <= 64, "%s: %lld rows, at most 64", op, static_cast<long long>(m));
  FT_CHECK(k % kRun == 0 && (group_size % kRun == 0 || group_size >= k),
           "%s: K %lld, groups of %lld", op, static_cast<long long>(k),
           static_cast<long long>(group_size));
  const QuantizedMatrix w =
      quantized_matrix(codes, scale, zero, table, n, k, group_size, scale_dtype, zero_kind);
  const auto run = [&](auto half) {
    using T = typename decltype(half)::type;
    Int4Linear<T> p{};
    const int status =
        make_int4_linear(op, p, y, partials, x, bias, w, partials_floats, m, x_stride_m, splits);
    if (status) return status;
    FT_CHECK(p.aligned, "%s: rows do not begin at 16 bytes", op);
    return table ? launch_tiles<T, true>(op, stream, p) : launch_tiles<T, false>(op, stream, p);
  };
  if (dtype == FT_BFLOAT16) return run(Type<bf16>{});
  if (dtype == FT_FLOAT16) return run(Type<fp16>{});
  return fail("%s: no kernel for dtype %d", op, dtype);
}
