// Weights packed once, as they stand in memory between calls of kernels.
#pragma once
#include <cstdint>

namespace fastft {

// Stands before the values of a packed W (n, k). These are the columns of a product over k, as
// [block of depth][strip of `lanes` lines][item][lane]. An item is a value of the weight's dtype
// or, with `pairs`, two bfloat16 values that are next to each other in depth. The lines that
// complete the last strip and the value that completes the last pair are zeros.
struct PackedWeight {
  uint32_t magic;
  int32_t dtype;
  int32_t lanes, pairs;
  int64_t n, k;
  int64_t block;  // items of depth
  int64_t reserved[3];
};
static_assert(sizeof(PackedWeight) == 64, "values begin at a cache line");

constexpr uint32_t kPackedMagic = 0x6b707466;  // "ftpk"

// Items of depth that an element of C sums up from zero. Two column strips of them stay in the
// first-level cache while the rows' block, half of the second level, passes by.
constexpr int64_t kDepthItems = 384;

// The bytes, header included, of W (n, k) packed at a level of the instruction set.
int64_t packed_weight_bytes(int level, int64_t n, int64_t k, int32_t dtype);

// Fails, as FT_CHECK does, unless `packed` holds W (n, k) of this dtype, packed at this level.
int check_packed_weight(const char* name, const void* packed, int64_t packed_bytes, int level,
                        int64_t n, int64_t k, int32_t dtype);

}  // namespace fastft
