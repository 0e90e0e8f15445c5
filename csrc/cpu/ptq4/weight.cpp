#include "cpu/ptq4/weight.h"

#include "cpu/parallel.h"
#include "fastft/status.h"

namespace fastft {

int make_int4_weight(const char* name, const uint8_t* codes, const void* scale, const void* zero,
                     const int32_t* perm, int64_t n, int64_t k, int64_t group_size,
                     int32_t codebook, int32_t zero_kind, int32_t scale_dtype,
                     std::vector<int32_t>& position, Int4Weight& weight) {
  FT_CHECK(n >= 0 && k >= 0 && group_size >= 1, "%s: sizes n %lld, k %lld, group_size %lld", name,
           static_cast<long long>(n), static_cast<long long>(k),
           static_cast<long long>(group_size));
  FT_CHECK(codebook >= FT_INT4 && codebook <= FT_FP4, "%s: unknown codebook %d", name, codebook);
  FT_CHECK(scale_dtype == FT_FLOAT32 || scale_dtype == FT_BFLOAT16,
           "%s: unknown dtype code %d of the scale", name, scale_dtype);
  FT_CHECK(zero_kind >= FT_ZERO_NONE && zero_kind <= FT_ZERO_FLOAT, "%s: unknown kind of zero %d",
           name, zero_kind);
  FT_CHECK(codebook == FT_INT4 || zero_kind == FT_ZERO_NONE, "%s: codebook %d has no zero", name,
           codebook);
  FT_CHECK(zero_kind == FT_ZERO_NONE || zero || !n || !k, "%s: zero is missing", name);
  const int64_t group = lesser(group_size, greater(k, 1));
  weight = {
      codes,          scale,    zero,        perm,     nullptr, n, k, group, ceil_div(k, group),
      ceil_div(k, 2), codebook, scale_dtype, zero_kind};
  if (!perm) return 0;
  if (invert_perm(name, perm, k, position)) return 1;
  weight.position = position.data();
  return 0;
}

int invert_perm(const char* name, const int32_t* perm, int64_t k, std::vector<int32_t>& position) {
  FT_CHECK(k <= INT32_MAX, "%s: perm of %lld features", name, static_cast<long long>(k));
  position.assign(size_t(k), -1);
  for (int64_t j = 0; j < k; ++j) {
    FT_CHECK(perm[j] >= 0 && perm[j] < k, "%s: perm[%lld] is %d, no feature of %lld", name,
             static_cast<long long>(j), perm[j], static_cast<long long>(k));
    FT_CHECK(position[size_t(perm[j])] < 0, "%s: perm has feature %d twice", name, perm[j]);
    position[size_t(perm[j])] = int32_t(j);
  }
  return 0;
}

}  // namespace fastft
