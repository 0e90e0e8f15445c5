#include "cpu/masked/step.h"

#include <new>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "fastft/api.h"
#include "fastft/status.h"

#define FT_BODY "cpu/masked/step.inl.hpp"
#include "cpu/isa.h"

namespace fastft {
namespace {

// By ft_isa.
constexpr const StepKernels* kLevels[] = {
    &scalar::kStep,
#if defined(__x86_64__)
    &avx2::kStep,
    &avx512::kStep,
    &avx512_bf16::kStep,
#endif
};

}  // namespace
}  // namespace fastft

int ft_cpu_masked_step(const ft_masked_segment* segments, const double* hypers, const int64_t* rng,
                       int64_t count, int32_t method, int32_t threads) {
  using namespace fastft;
  const char* name = "cpu_masked_step";
  const StepMethod own = static_cast<StepMethod>(method);
  if (check_step(name, count, method)) return 1;
  threads = usable_threads(threads);
  try {
    std::vector<StepSegment> all;
    all.reserve(size_t(count));
    int64_t values = 0;
    for (int64_t i = 0; i < count; ++i) {
      const ft_masked_segment& s = segments[i];
      const Rectangles at = rectangles_of(s);
      if (check_segment(name, s, own) || check_rectangles(name, at, threads)) return 1;
      all.push_back({s.weight, s.value, s.first, s.second, s.grad, at, int32_t(s.dtype),
                     step_factors(own, hypers + i * FT_STEP_HYPERS), values});
      values += at.values();
    }
    kLevels[active_isa()]->step({all.data(), count, values, rng, own, threads});
  } catch (const std::bad_alloc&) {
    return fail("%s: no memory for the segments", name);
  }
  return 0;
}
