#include "cpu/matmul.h"

#include <new>

#include "cpu/dispatch.h"
#include "cpu/pack.h"
#include "fastft/api.h"
#include "fastft/status.h"

#define FT_BODY "cpu/matmul.inl.hpp"
#include "cpu/isa.h"

namespace fastft {
namespace {

// By ft_isa.
constexpr const MatmulKernels* kLevels[] = {
    &scalar::kMatmul,
#if defined(__x86_64__)
    &avx2::kMatmul,
    &avx512::kMatmul,
    &avx512_bf16::kMatmul,
#endif
};

int check_weight(const char* name, int64_t n, int64_t k, int32_t dtype) {
  FT_CHECK(dtype >= FT_FLOAT32 && dtype <= FT_FLOAT16, "%s: unknown dtype code %d", name, dtype);
  FT_CHECK(n >= 0 && k >= 0, "%s: sizes n %lld, k %lld are not a weight's", name,
           static_cast<long long>(n), static_cast<long long>(k));
  return 0;
}

}  // namespace
}  // namespace fastft

int ft_cpu_matmul(void* c, const void* a, const void* b, const void* packed_b,
                  int64_t packed_b_bytes, int64_t m, int64_t n, int64_t k, int64_t a_stride_m,
                  int64_t a_stride_k, int64_t b_stride_n, int64_t b_stride_k,
                  int32_t packed_transposed, int32_t dtype, int32_t threads) {
  using namespace fastft;
  const char* name = "cpu_matmul";
  const int level = active_isa();
  if (check_weight(name, n, k, dtype)) return 1;
  FT_CHECK(m >= 0, "%s: m %lld is no size", name, static_cast<long long>(m));
  FT_CHECK(!b || !packed_b, "%s: both b and packed_b", name);
  if (packed_b && check_packed_weight(name, packed_b, packed_b_bytes, level,
                                      packed_transposed ? k : n, packed_transposed ? n : k, dtype))
    return 1;
  try {
    kLevels[level]->matmul({c, a, b, packed_b, m, n, k, a_stride_m, a_stride_k, b_stride_n,
                            b_stride_k, packed_transposed != 0, dtype, usable_threads(threads)});
  } catch (const std::bad_alloc&) {
    return fail("%s: no memory for scratch buffers", name);
  }
  return 0;
}

int ft_cpu_pack_weight_bytes(int64_t* bytes, int64_t n, int64_t k, int32_t dtype) {
  using namespace fastft;
  if (check_weight("cpu_pack_weight_bytes", n, k, dtype)) return 1;
  *bytes = packed_weight_bytes(active_isa(), n, k, dtype);
  return 0;
}

int ft_cpu_pack_weight(void* packed, const void* weight, int64_t packed_bytes, int64_t n, int64_t k,
                       int64_t stride_n, int64_t stride_k, int32_t dtype, int32_t threads) {
  using namespace fastft;
  const char* name = "cpu_pack_weight";
  const int level = active_isa();
  if (check_weight(name, n, k, dtype)) return 1;
  const int64_t expected = packed_weight_bytes(level, n, k, dtype);
  FT_CHECK(packed_bytes == expected, "%s: packed of %lld bytes, not %lld", name,
           static_cast<long long>(packed_bytes), static_cast<long long>(expected));
  prefer_huge_pages(packed, packed_bytes);
  kLevels[level]->pack_weight({packed, const_cast<void*>(weight), n, k, stride_n, stride_k, dtype,
                               usable_threads(threads)});
  return 0;
}

int ft_cpu_unpack_weight(void* weight, const void* packed, int64_t packed_bytes, int64_t n,
                         int64_t k, int32_t dtype, int32_t threads) {
  using namespace fastft;
  const char* name = "cpu_unpack_weight";
  const int level = active_isa();
  if (check_weight(name, n, k, dtype) ||
      check_packed_weight(name, packed, packed_bytes, level, n, k, dtype))
    return 1;
  kLevels[level]->unpack_weight(
      {const_cast<void*>(packed), weight, n, k, k, 1, dtype, usable_threads(threads)});
  return 0;
}
