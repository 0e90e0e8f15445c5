#include "cpu/masked/step.h"

#include <cmath>
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

// From FT_STEP_HYPERS numbers, see api.h.
StepFactors factors_of(StepMethod method, const double* h) {
  const double lr = h[0], decay = h[1], t = h[2];
  StepFactors f{float(h[3]), {}};
  const auto set = [&](std::initializer_list<double> values) {
    float* to = f.of;
    for (const double value : values) *to++ = float(value);
  };
  if (method == StepMethod::kAdamW) {
    const double beta1 = h[4], beta2 = h[5], eps = h[6];
    set({1 - lr * decay, 1 - beta1, beta2, 1 - beta2, lr / (1 - std::pow(beta1, t)),
         std::sqrt(1 - std::pow(beta2, t)), eps});
  } else if (method == StepMethod::kSGD) {
    const double momentum = h[4], dampening = h[5], nesterov = h[6];
    const bool begun = t > 1;
    set({decay, begun ? momentum : 0, begun ? 1 - dampening : 1, nesterov, lr, momentum});
  } else {
    set({1 - lr * decay, 1 - h[4], 1 - h[5], lr});
  }
  return f;
}

int check_segment(const char* name, const ft_masked_segment& s, StepMethod method) {
  FT_CHECK(s.dtype >= FT_FLOAT32 && s.dtype <= FT_FLOAT16, "%s: unknown dtype code %lld", name,
           static_cast<long long>(s.dtype));
  if (!s.count) return 0;
  FT_CHECK(s.weight && s.grad && s.index, "%s: a segment without weight, gradient or index", name);
  FT_CHECK(method == StepMethod::kSGD || s.first, "%s: a segment without state", name);
  FT_CHECK(method != StepMethod::kAdamW || s.second, "%s: a segment without second moment", name);
  return 0;
}

}  // namespace
}  // namespace fastft

int ft_cpu_masked_step(const ft_masked_segment* segments, const double* hypers, const int64_t* rng,
                       int64_t count, int32_t method, int32_t threads) {
  using namespace fastft;
  const char* name = "cpu_masked_step";
  const StepMethod own = static_cast<StepMethod>(method);
  FT_CHECK(method >= 0 && method < int32_t(StepMethod::kCount), "%s: unknown method %d", name,
           method);
  FT_CHECK(count >= 0, "%s: %lld segments", name, static_cast<long long>(count));
  threads = usable_threads(threads);
  try {
    std::vector<StepSegment> all;
    all.reserve(size_t(count));
    int64_t values = 0;
    for (int64_t i = 0; i < count; ++i) {
      const ft_masked_segment& s = segments[i];
      const Rectangles at{s.index, s.count, s.rows, s.columns, s.stride, s.size, s.index_bytes};
      if (check_segment(name, s, own) || check_rectangles(name, at, threads)) return 1;
      all.push_back({s.weight, s.value, s.first, s.second, s.grad, at, int32_t(s.dtype),
                     factors_of(own, hypers + i * FT_STEP_HYPERS), values});
      values += at.values();
    }
    kLevels[active_isa()]->step({all.data(), count, values, rng, own, threads});
  } catch (const std::bad_alloc&) {
    return fail("%s: no memory for the segments", name);
  }
  return 0;
}
