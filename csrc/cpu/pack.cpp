#include "cpu/pack.h"

#include "cpu/parallel.h"
#include "fastft/api.h"
#include "fastft/dtype.h"
#include "fastft/status.h"

namespace fastft {
namespace {

// By ft_isa.
constexpr int kLanesOf[] = {4, 8, 16, 16};

}  // namespace

int64_t packed_weight_bytes(int level, int64_t n, int64_t k, int32_t dtype) {
  const int64_t lines = ceil_div(n, kLanesOf[level]) * kLanesOf[level];
  const bool pairs = level == FT_AVX512_BF16 && dtype == FT_BFLOAT16;
  const int64_t values = lines * (pairs ? ceil_div(k, 2) * 2 : k);
  return int64_t(sizeof(PackedWeight)) + values * (dtype == FT_FLOAT32 ? 4 : 2);
}

int check_packed_weight(const char* name, const void* packed, int64_t packed_bytes, int level,
                        int64_t n, int64_t k, int32_t dtype) {
  FT_CHECK(packed_bytes >= int64_t(sizeof(PackedWeight)), "%s: %lld bytes are no packed weight",
           name, static_cast<long long>(packed_bytes));
  PackedWeight header;
  std::memcpy(&header, packed, sizeof header);
  FT_CHECK(header.magic == kPackedMagic, "%s: these bytes are no packed weight", name);
  FT_CHECK(header.n == n && header.k == k && header.dtype == dtype,
           "%s: the packed weight is (%lld, %lld) with dtype code %d, not (%lld, %lld) with %d",
           name, static_cast<long long>(header.n), static_cast<long long>(header.k), header.dtype,
           static_cast<long long>(n), static_cast<long long>(k), dtype);
  const int pairs = level == FT_AVX512_BF16 && dtype == FT_BFLOAT16;
  FT_CHECK(header.lanes == kLanesOf[level] && header.pairs == pairs && header.block == kDepthItems,
           "%s: the weight was packed for another instruction set (%d lanes, pairs %d, block %lld; "
           "here %d, %d, %lld): pack it again",
           name, header.lanes, header.pairs, static_cast<long long>(header.block), kLanesOf[level],
           pairs, static_cast<long long>(kDepthItems));
  const int64_t expected = packed_weight_bytes(level, n, k, dtype);
  FT_CHECK(packed_bytes == expected, "%s: the packed weight has %lld bytes, not %lld", name,
           static_cast<long long>(packed_bytes), static_cast<long long>(expected));
  return 0;
}

}  // namespace fastft
