#include "cpu/masked/entries.h"

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "fastft/api.h"
#include "fastft/status.h"

#define FT_BODY "cpu/masked/entries.inl.hpp"
#include "cpu/isa.h"

namespace fastft {
namespace {

// By ft_isa.
constexpr const EntryKernels* kLevels[] = {
    &scalar::kEntries,
#if defined(__x86_64__)
    &avx2::kEntries,
    &avx512::kEntries,
    &avx512_bf16::kEntries,
#endif
};

int check_entries(const char* name, const Entries& f) {
  FT_CHECK(f.dtype >= FT_FLOAT32 && f.dtype <= FT_FLOAT16, "%s: unknown dtype code %d", name,
           f.dtype);
  FT_CHECK(f.values_dtype == f.dtype || f.values_dtype == FT_FLOAT32,
           "%s: values of dtype code %d beside a weight of %d", name, f.values_dtype, f.dtype);
  return check_rectangles(name, f.at, f.threads);
}

// Two ascending lists into one, and where each of its entries came from: its place in the index
// that `kept` is a selection of, or -1. Fails where they share an entry or one does not ascend.
template <class Index>
int merge(Index* merged, int64_t* source, const Index* index, const int64_t* kept,
          const Index* grown, int64_t count, int64_t kept_count, int64_t grown_count) {
  const char* name = "cpu_masked_merge";
  for (int64_t i = 0; i < kept_count; ++i)
    FT_CHECK(kept[i] >= 0 && kept[i] < count && (!i || kept[i] > kept[i - 1]),
             "%s: kept does not ascend within %lld entries", name, static_cast<long long>(count));
  int64_t k = 0, g = 0, at = 0;
  while (k < kept_count || g < grown_count) {
    const bool old = g == grown_count || (k < kept_count && index[kept[k]] < grown[g]);
    merged[at] = old ? index[kept[k]] : grown[g];
    source[at] = old ? kept[k] : -1;
    old ? ++k : ++g;
    FT_CHECK(!at || merged[at] > merged[at - 1],
             "%s: grown does not ascend, or holds an entry that is kept", name);
    ++at;
  }
  return 0;
}

}  // namespace
}  // namespace fastft

int ft_cpu_masked_gather(void* values, const void* weight, const void* index, int64_t count,
                         int64_t rows, int64_t columns, int64_t stride, int64_t size,
                         int32_t index_bytes, int32_t dtype, int32_t threads) {
  using namespace fastft;
  const Entries f{const_cast<void*>(weight),
                  values,
                  nullptr,
                  {index, count, rows, columns, stride, size, index_bytes},
                  dtype,
                  dtype,
                  usable_threads(threads)};
  if (check_entries("cpu_masked_gather", f)) return 1;
  kLevels[active_isa()]->gather(f);
  return 0;
}

int ft_cpu_masked_scatter(void* weight, const void* values, const void* index, const float* alpha,
                          int64_t count, int64_t rows, int64_t columns, int64_t stride,
                          int64_t size, int32_t index_bytes, int32_t values_dtype, int32_t dtype,
                          int32_t threads) {
  using namespace fastft;
  const Entries f{weight,
                  const_cast<void*>(values),
                  alpha,
                  {index, count, rows, columns, stride, size, index_bytes},
                  dtype,
                  values_dtype,
                  usable_threads(threads)};
  if (check_entries("cpu_masked_scatter", f)) return 1;
  kLevels[active_isa()]->scatter(f);
  return 0;
}

int ft_cpu_masked_merge(void* merged, int64_t* source, const void* index, const int64_t* kept,
                        const void* grown, int64_t count, int64_t kept_count, int64_t grown_count,
                        int32_t index_bytes) {
  using namespace fastft;
  FT_CHECK(index_bytes == 4 || index_bytes == 8, "cpu_masked_merge: index of %d bytes",
           index_bytes);
  if (index_bytes == 4)
    return merge(static_cast<int32_t*>(merged), source, static_cast<const int32_t*>(index), kept,
                 static_cast<const int32_t*>(grown), count, kept_count, grown_count);
  return merge(static_cast<int64_t*>(merged), source, static_cast<const int64_t*>(index), kept,
               static_cast<const int64_t*>(grown), count, kept_count, grown_count);
}
