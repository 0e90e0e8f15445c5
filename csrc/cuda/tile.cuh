// Tiles in shared memory, always float32, and the way of global memory's dtypes into them.
//
// Two kinds of operand meet in a skinny product. A *wide* matrix (x, grad, y) is read or written
// in groups of eight consecutive elements of a row: 16 bytes of a half dtype, and the elements
// that share one call of Philox. A *factor* (A, B, xa, T) has `kRanks` ranks per tile and is staged
// rank by rank, so that both operands of every product are read as quads along the same index.
#pragma once
#include <cstdint>

#include "cuda/launch.cuh"
#include "fastft/dtype.h"
#include "fastft/philox.h"

namespace fastft {

constexpr int kRanks = 16;  // of a tile; a larger R takes several
constexpr int kGroup = kDropoutGroup;

// Eight consecutive elements as they lie in memory: packed, or a half dtype would take a register
// per element.
template <class T>
struct alignas(16) Group {
  static constexpr int kPerWord = 4 / sizeof(T);
  uint32_t word[kGroup / kPerWord];

  __device__ __forceinline__ T get(int i) const {
    if constexpr (kPerWord == 1) {
      return bits_float(word[i]);
    } else {
      return T{uint16_t(word[i / 2] >> (i % 2 * 16))};
    }
  }
  __device__ __forceinline__ void set(int i, T value) {
    if constexpr (kPerWord == 1) {
      word[i] = float_bits(value);
    } else {
      const int shift = i % 2 * 16;
      word[i / 2] = (word[i / 2] & ~(0xffffu << shift)) | uint32_t(value.bits) << shift;
    }
  }
};
struct alignas(16) Quad {
  float value[4];
};

FT_HOST_DEVICE Quad load_quad(const float* p) { return *reinterpret_cast<const Quad*>(p); }

// Four floats are skipped after every 32: lanes 8 floats apart, which would meet in one bank, then
// don't. The pitch makes eight consecutive rows start in different banks.
FT_HOST_DEVICE constexpr int skewed(int column) { return column + column / 32 * 4; }
template <int kColumns>
constexpr int kPitch = skewed(kColumns) + 4;

// A matrix with unit column stride. aligned: every group of every row starts at 16 bytes.
template <class T>
struct Wide {
  T* data;
  int64_t rows, columns, stride;
  bool aligned;
};

template <class T>
Wide<T> wide(T* data, int64_t rows, int64_t columns, int64_t stride) {
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * sizeof(T) % 16 == 0;
  return {data, rows, columns, stride, aligned};
}

// Zeros outside the matrix.
template <class T>
__device__ __forceinline__ Group<T> load_group(const Wide<const T>& matrix, int64_t row,
                                               int64_t column) {
  Group<T> group{};
  if (row >= matrix.rows || column >= matrix.columns) return group;
  const T* source = matrix.data + row * matrix.stride + column;
  if (matrix.aligned && column + kGroup <= matrix.columns)
    group = *reinterpret_cast<const Group<T>*>(source);
  else
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (column + i < matrix.columns) group.set(i, source[i]);
  return group;
}

template <class T>
__device__ __forceinline__ void store_group(const Wide<T>& matrix, int64_t row, int64_t column,
                                            const Group<T>& group) {
  if (row >= matrix.rows || column >= matrix.columns) return;
  T* target = matrix.data + row * matrix.stride + column;
  if (matrix.aligned && column + kGroup <= matrix.columns) {
    *reinterpret_cast<Group<T>*>(target) = group;
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (column + i < matrix.columns) target[i] = group.get(i);
  }
}

__device__ __forceinline__ uint32_t keep_bits(const Philox4& words, uint32_t threshold) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kDropoutGroup; ++i)
    bits |= (philox_half(words, i) >= threshold ? 1u : 0u) << i;
  return bits;
}

// Bit i: the element of linear index `first` + i is kept. One call of Philox, unless the group
// straddles two of its counters because K is no multiple of 8.
__device__ __forceinline__ uint32_t keep_bits(const Dropout& dropout, int64_t first) {
  if (dropout.threshold == 0) return 0xffu;
  const uint64_t counter = uint64_t(first) / kDropoutGroup;
  const int shift = int(first % kDropoutGroup);
  uint32_t bits = keep_bits(philox4x32(dropout.seed, counter, dropout.offset), dropout.threshold);
  if (shift)
    bits |= keep_bits(philox4x32(dropout.seed, counter + 1, dropout.offset), dropout.threshold)
            << kDropoutGroup;
  return bits >> shift;
}

// A block's tile of a wide matrix on its way from global memory through registers, where it waits
// while the tile before it is computed on, to shared memory.
template <class T, int kRows, int kColumns>
struct WideTile {
  static constexpr int kGroups = kRows * kColumns / (kGroup * kThreads);  // per thread
  static constexpr int kGroupsPerRow = kColumns / kGroup;
  static_assert(kGroups * kGroup * kThreads == kRows * kColumns, "a whole number of groups");

  Group<T> group[kGroups];

  __device__ __forceinline__ void load(const Wide<const T>& matrix, int64_t row, int64_t column) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int place = int(threadIdx.x) + i * kThreads;
      group[i] =
          load_group(matrix, row + place / kGroupsPerRow, column + place % kGroupsPerRow * kGroup);
    }
  }

  // Dropped elements become 0, not 0 times themselves; the scale is the caller's.
  __device__ __forceinline__ void store(float (*tile)[kPitch<kColumns>], const Dropout& dropout,
                                        const Wide<const T>& matrix, int64_t row, int64_t column) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int place = int(threadIdx.x) + i * kThreads;
      const int r = place / kGroupsPerRow, c = place % kGroupsPerRow * kGroup;
      const uint32_t keep = keep_bits(dropout, (row + r) * matrix.columns + column + c);
      float* target = &tile[r][skewed(c)];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Quad quad;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int e = half * 4 + j;
          quad.value[j] = (keep >> e & 1u) ? to_float(group[i].get(e)) : 0.0f;
        }
        *reinterpret_cast<Quad*>(target + half * 4) = quad;
      }
    }
  }
};

enum class Layout { kRanksInner, kRanksOuter };

// A contiguous matrix (size, ranks), as B, xa and T lie, or (ranks, size), as A does.
template <class T, Layout layout>
struct Factor {
  static constexpr bool kRanksInner = layout == Layout::kRanksInner;
  const T* data;
  int64_t size, ranks;
};

// As WideTile, for kSize by kRanks elements of a factor; element (i, j) goes to tile[j][i].
template <class T, Layout layout, int kSize>
struct FactorTile {
  using Source = Factor<T, layout>;
  static constexpr int kElements = kSize * kRanks / kThreads;  // per thread
  static constexpr int kInner = Source::kRanksInner ? kRanks : kSize;
  static constexpr int kStep = kThreads / kInner;
  static_assert(kElements * kThreads == kSize * kRanks && kThreads % kInner == 0,
                "consecutive threads on consecutive addresses, each on one inner index");

  float value[kElements];

  __device__ __forceinline__ void load(const Source& factor, int64_t first, int64_t rank) {
    const int64_t length = Source::kRanksInner ? factor.ranks : factor.size;  // of a row in memory
    const int64_t inner = int(threadIdx.x) % kInner + (Source::kRanksInner ? rank : first);
    const int64_t outer = int(threadIdx.x) / kInner + (Source::kRanksInner ? first : rank);
    const int64_t rows = (Source::kRanksInner ? factor.size : factor.ranks) - outer;
    const T* source = factor.data + outer * length + inner;
#pragma unroll
    for (int element = 0; element < kElements; ++element) {
      const bool inside = inner < length && element * kStep < rows;
      value[element] = inside ? to_float(source[element * kStep * length]) : 0.0f;
    }
  }

  __device__ __forceinline__ void store(float (*tile)[kPitch<kSize>]) const {
    const int inner = int(threadIdx.x) % kInner;
#pragma unroll
    for (int element = 0; element < kElements; ++element) {
      const int outer = int(threadIdx.x) / kInner + element * kStep;
      if constexpr (Source::kRanksInner) {
        tile[inner][skewed(outer)] = value[element];
      } else {
        tile[outer][skewed(inner)] = value[element];
      }
    }
  }
};

}  // namespace fastft
