#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "fastft/status.h"

namespace fastft {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512_bf16"};

// __builtin_cpu_supports asks the operating system too, not only the CPU.
int detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")))
    return FT_SCALAR;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")))
    return FT_AVX2;
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")
             ? FT_AVX512_BF16
             : FT_AVX512;
#else
  return FT_SCALAR;
#endif
}

int detected_isa() {
  static const int level = detect();
  return level;
}

int initial_isa() {
  const char* cap = std::getenv("PYFASTFT_CPU_ISA");
  for (int level = 0; cap && level < detected_isa(); ++level)
    if (!std::strcmp(cap, kNames[level])) return level;
  return detected_isa();
}

std::atomic<int>& isa() {
  static std::atomic<int> level{initial_isa()};
  return level;
}

}  // namespace

int active_isa() { return isa().load(std::memory_order_relaxed); }

}  // namespace fastft

const char* ft_last_error() { return fastft::error_buffer(); }

int ft_cpu_isa(int32_t* detected, int32_t* active) {
  *detected = fastft::detected_isa();
  *active = fastft::active_isa();
  return 0;
}

int ft_cpu_set_isa(int32_t level) {
  FT_CHECK(level >= FT_SCALAR && level <= fastft::detected_isa(),
           "set_isa: level %d is not between 0 and %d, the highest that runs here", level,
           fastft::detected_isa());
  fastft::isa().store(level, std::memory_order_relaxed);
  return 0;
}
