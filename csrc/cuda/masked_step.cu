// One optimizer step over the trained parts of all weights, of any dtype, in one launch.
//
// A block has kBlockValues values of one weight, which it finds in the table of starts. A thread
// steps one value at a time, a block's width apart from the next, so that masters, state, gradients
// and index are read and written as streams; the weight's entries are reached by the index, which
// ascends, so that neighbours share sectors.
//
// Numerics: float32, every operation rounded to nearest by itself, none fused, in the order of the
// reference. A weight of half precision gets the new value rounded to nearest, or stochastically
// with the bits of Philox(seed, value / 8, offset), half value % 8 (see pyfastft/_random.py).
//
// Traffic: 28 B of AdamW's streams and the index for a value, and the sectors of the weight.
#include "cuda/masked.cuh"
#include "fastft/api.h"
#include "fastft/rounding.h"

namespace fastft {
namespace {

constexpr int kBlockValues = 4 * kThreads;

// The compiler fuses none of these with another.
__device__ __forceinline__ float multiply(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
__device__ __forceinline__ float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}
__device__ __forceinline__ float subtract(float a, float b) { return add(a, -b); }
__device__ __forceinline__ float divide(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}
__device__ __forceinline__ float root(float a) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(a);
#else
  return std::sqrt(a);
#endif
}

// The methods: the new value, from the old one, the gradient and the state, which they update. The
// numbers f are those of StepFactors::of.
struct AdamW {
  static constexpr bool kSecond = true;
  static __device__ __forceinline__ float update(const float* f, float value, float grad, bool,
                                                 float& m, float& v) {
    m = add(m, multiply(f[1], subtract(grad, m)));
    v = add(multiply(f[2], v), multiply(multiply(f[3], grad), grad));
    const float denominator = add(divide(root(v), f[5]), f[6]);
    return subtract(multiply(value, f[0]), multiply(f[4], divide(m, denominator)));
  }
};

struct SGD {
  static constexpr bool kSecond = false;
  static __device__ __forceinline__ float update(const float* f, float value, float grad,
                                                 bool has_buffer, float& buffer, float&) {
    float direction = add(grad, multiply(f[0], value));
    if (has_buffer) {
      const float taken = multiply(f[2], direction);
      // The first step's buffer is the gradient, whatever stood there.
      buffer = f[1] == 0.0f ? taken : add(multiply(f[1], buffer), taken);
      direction = f[3] != 0.0f ? add(direction, multiply(f[5], buffer)) : buffer;
    }
    return subtract(value, multiply(f[4], direction));
  }
};

struct Lion {
  static constexpr bool kSecond = false;
  static __device__ __forceinline__ float update(const float* f, float value, float grad, bool,
                                                 float& m, float&) {
    const float ahead = subtract(grad, m);
    const float direction = add(m, multiply(f[1], ahead));
    // A direction that is no number stays one that is none.
    const float sign = direction > 0.0f ? 1.0f : direction < 0.0f ? -1.0f : direction;
    m = add(m, multiply(f[2], ahead));
    return subtract(multiply(value, f[0]), multiply(f[3], sign));
  }
};

// Where a value stands in the weight.
__device__ __forceinline__ int64_t offset_of(const Rectangles& r, int64_t value) {
  if (r.area() == 1) return r.start(value);
  const int64_t line = quotient(value, r.columns), rectangle = quotient(line, r.rows);
  return r.start(rectangle) + (line - rectangle * r.rows) * r.stride + value - line * r.columns;
}

// `position` is the value's among all segments'.
template <class T>
__device__ __forceinline__ T rounded(float value, const int64_t* rng, int64_t position) {
  if (!rng || sizeof(T) == sizeof(float)) return from_float<T>(value);
  const Philox4 words =
      philox4x32(uint64_t(rng[0]), uint64_t(position) / kDropoutGroup, uint64_t(rng[1]));
  const int half = int(position % kDropoutGroup);
  return round_stochastic<T>(value, word_of(words, half / 2) >> half % 2 * 16 & 0xffffu);
}

template <class Method, class T>
__device__ __forceinline__ void step_values(const ft_masked_segment& s, const StepFactors& factors,
                                            const int64_t* rng, int64_t first, int64_t before) {
  const Rectangles at = rectangles_of(s);
  T* const weight = static_cast<T*>(s.weight);
  const int64_t end = first + kBlockValues < at.values() ? first + kBlockValues : at.values();
  for (int64_t i = first + threadIdx.x; i < end; i += kThreads) {
    T& entry = weight[offset_of(at, i)];
    float m = s.first ? s.first[i] : 0.0f;
    float v = Method::kSecond ? s.second[i] : 0.0f;
    const float value = s.value ? s.value[i] : to_float(entry);
    const float grad = multiply(factors.sign, s.grad[i]);
    const float updated = Method::update(factors.of, value, grad, s.first != nullptr, m, v);
    if (s.first) s.first[i] = m;
    if (Method::kSecond) s.second[i] = v;
    if (s.value) s.value[i] = updated;
    entry = rounded<T>(updated, rng, before + i);
  }
}

template <class Method>
__global__ __launch_bounds__(kThreads, 4) void masked_step(const ft_masked_segment* segments,
                                                           const Start* starts,
                                                           const StepFactors* factors,
                                                           const int64_t* rng, int64_t count) {
  const int64_t number = tensor_of_block(starts, count);
  const ft_masked_segment s = segments[number];
  const StepFactors f = factors[number];
  const int64_t before = starts[number].values;
  const int64_t first = (int64_t(blockIdx.x) - starts[number].blocks) * kBlockValues;
  if (s.dtype == FT_FLOAT32)
    step_values<Method, float>(s, f, rng, first, before);
  else if (s.dtype == FT_BFLOAT16)
    step_values<Method, bf16>(s, f, rng, first, before);
  else
    step_values<Method, fp16>(s, f, rng, first, before);
}

}  // namespace
}  // namespace fastft

using namespace fastft;

int ft_cuda_masked_step_plan(int64_t* starts, float* factors, const ft_masked_segment* segments,
                             const double* hypers, int64_t count, int32_t method) {
  const char* op = "masked_step";
  if (check_step(op, count, method)) return 1;
  const StepMethod own = static_cast<StepMethod>(method);
  Start* const to = reinterpret_cast<Start*>(starts);
  to[0] = {0, 0};
  for (int64_t i = 0; i < count; ++i) {
    const ft_masked_segment& s = segments[i];
    const Rectangles at = rectangles_of(s);
    if (check_segment(op, s, own) || check_sizes(op, at)) return 1;
    to[i + 1] = {to[i].blocks + ceil_div<int64_t>(at.values(), kBlockValues),
                 to[i].values + at.values()};
    reinterpret_cast<StepFactors*>(factors)[i] = step_factors(own, hypers + i * FT_STEP_HYPERS);
  }
  return 0;
}

int ft_cuda_masked_step(const ft_masked_segment* segments, const int64_t* starts,
                        const float* factors, const int64_t* rng, int64_t count, int64_t blocks,
                        int32_t method, void* stream) {
  const char* op = "masked_step";
  if (check_step(op, count, method)) return 1;
  const StepMethod own = static_cast<StepMethod>(method);
  const auto kernel = own == StepMethod::kAdamW ? masked_step<AdamW>
                      : own == StepMethod::kSGD ? masked_step<SGD>
                                                : masked_step<Lion>;
  return launch(op, stream, blocks, kernel, segments, reinterpret_cast<const Start*>(starts),
                reinterpret_cast<const StepFactors*>(factors), rng, count);
}
