// A 4-bit weight as the kernels see it: the tensors of pyfastft/ops/ptq4.md, checked.
#pragma once
#include <cstdint>
#include <vector>

#include "fastft/codebook.h"
#include "fastft/dtype.h"

namespace fastft {

struct Int4Weight {
  const uint8_t* codes;      // (n, row_bytes)
  const void *scale, *zero;  // (n, groups), or null
  const int32_t* perm;       // (k), or null: the feature of each position
  const int32_t* position;   // its inverse, or null
  int64_t n, k, group, groups, row_bytes;
  int32_t codebook, scale_dtype, zero_kind;
};

// Fills in a weight from an ABI function's arguments; the inverse of perm goes into `position`.
// Fails, as FT_CHECK does, where sizes or codes of enums are none, or perm is no permutation.
int make_int4_weight(const char* name, const uint8_t* codes, const void* scale, const void* zero,
                     const int32_t* perm, int64_t n, int64_t k, int64_t group_size,
                     int32_t codebook, int32_t zero_kind, int32_t scale_dtype,
                     std::vector<int32_t>& position, Int4Weight& weight);

// The inverse of perm. Fails, as FT_CHECK does, where it is no permutation of k features.
int invert_perm(const char* name, const int32_t* perm, int64_t k, std::vector<int32_t>& position);

}  // namespace fastft
