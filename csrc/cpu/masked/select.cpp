#include "cpu/masked/select.h"

#include <new>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/masked/rectangles.h"
#include "cpu/parallel.h"
#include "fastft/api.h"
#include "fastft/status.h"

#define FT_BODY "cpu/masked/select.inl.hpp"
#include "cpu/isa.h"

namespace fastft {
namespace {

// By ft_isa.
constexpr const SelectKernels* kLevels[] = {
    &scalar::kSelect,
#if defined(__x86_64__)
    &avx2::kSelect,
    &avx512::kSelect,
    &avx512_bf16::kSelect,
#endif
};

}  // namespace
}  // namespace fastft

int ft_cpu_select_topk(int64_t* index, int64_t* counts, const ft_masked_scored* tensors,
                       const int64_t* rng, int64_t count, int64_t k, int32_t score, int32_t largest,
                       int32_t threads) {
  using namespace fastft;
  const char* name = "cpu_select_topk";
  FT_CHECK(score >= 0 && score < int32_t(Score::kCount), "%s: unknown score %d", name, score);
  FT_CHECK(score != int32_t(Score::kRandom) || rng || !k, "%s: a random score without rng", name);
  threads = usable_threads(threads);
  try {
    std::vector<Scored> all;
    all.reserve(size_t(count));
    int64_t size = 0, excluded = 0;
    for (int64_t i = 0; i < count; ++i) {
      const ft_masked_scored& s = tensors[i];
      FT_CHECK(s.dtype >= FT_FLOAT32 && s.dtype <= FT_FLOAT16, "%s: unknown dtype code %lld", name,
               static_cast<long long>(s.dtype));
      if (check_rectangles(name, excluded_of(s), threads)) return 1;
      all.push_back({s.a, s.b, s.exclude, s.size, s.columns, s.excluded, s.exclude_bytes,
                     int32_t(s.dtype), size});
      size += s.size;
      excluded += s.excluded;
    }
    FT_CHECK(k >= 0 && k <= size - excluded, "%s: k %lld of %lld entries", name,
             static_cast<long long>(k), static_cast<long long>(size - excluded));
    const int64_t found =
        kLevels[active_isa()]->select({index, counts, all.data(), count, size, k, rng,
                                       static_cast<Score>(score), largest != 0, threads});
    FT_CHECK(found == k, "%s: found fewer entries than there are", name);
  } catch (const std::bad_alloc&) {
    return fail("%s: no memory for scratch buffers", name);
  }
  return 0;
}
