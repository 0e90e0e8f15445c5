// One optimizer step over the trained parts of all weights, for one level of the instruction set.
//
// Values are worked through in chunks that stay in the first-level cache: state is read, updated
// and written as vectors, then the new values go to where they live in the weight, whose lines are
// asked for ahead of time; they are most of the traffic. Tasks are long, because state is read as
// five streams, which every task begins anew. In float32; a weight of half
// precision gets its master rounded to nearest, or stochastically with the bits of
// Philox(seed, value / 8, offset), half value % 8 (see pyfastft/_random.py).
#include "cpu/vec.inl.hpp"
// After the vocabulary:
#include "cpu/masked/rectangles.inl.hpp"

namespace {

constexpr int64_t kStepChunk = 512;                                  // values
constexpr int64_t kStepLeast = 4 * kStepChunk, kStepMost = 1 << 16;  // values of a task
constexpr int64_t kStepTasks = 4;                                    // of each thread, at least
constexpr int64_t kStepSerial = 8192;  // fewer values are not worth waking a thread for

FT_INLINE Vec root(Vec v) {
#if FT_LANES == 16
  return _mm512_sqrt_ps(v);
#elif FT_LANES == 8
  return _mm256_sqrt_ps(v);
#else
  for (int lane = 0; lane < kLanes; ++lane) v[lane] = __builtin_sqrtf(v[lane]);
  return v;
#endif
}

struct AdamW {
  Vec keep, take1, beta2, take2, rate, correction, eps;
  explicit AdamW(const StepFactors& f)
      : keep(splat(f.of[0])),
        take1(splat(f.of[1])),
        beta2(splat(f.of[2])),
        take2(splat(f.of[3])),
        rate(splat(f.of[4])),
        correction(splat(f.of[5])),
        eps(splat(f.of[6])) {}
  static constexpr bool kFirst = true, kSecond = true;
  FT_INLINE Vec update(Vec value, Vec grad, Vec& m, Vec& v) const {
    m = fma(take1, grad - m, m);
    v = fma(mul(take2, grad), grad, mul(beta2, v));
    const Vec denominator = add(root(v) / correction, eps);
    return mul(value, keep) - mul(rate, m / denominator);
  }
};

struct SGD {
  Vec decay, momentum, take, rate;
  bool nesterov;
  explicit SGD(const StepFactors& f)
      : decay(splat(f.of[0])),
        momentum(splat(f.of[1])),
        take(splat(f.of[2])),
        rate(splat(f.of[4])),
        nesterov(f.of[3] != 0.0f) {}
  static constexpr bool kFirst = false, kSecond = false;
  FT_INLINE Vec direction(Vec value, Vec grad) const { return fma(decay, value, grad); }
  FT_INLINE Vec update(Vec value, Vec grad, Vec&, Vec&) const {
    return value - mul(rate, direction(value, grad));
  }
};

// SGD with a buffer of momentum; Nesterov's looks ahead by factors of[5], the momentum itself.
struct Momentum : SGD {
  Vec ahead;
  explicit Momentum(const StepFactors& f) : SGD(f), ahead(splat(f.of[5])) {}
  static constexpr bool kFirst = true;
  FT_INLINE Vec update(Vec value, Vec grad, Vec& buffer, Vec&) const {
    const Vec own = direction(value, grad);
    buffer = add(mul(momentum, buffer), mul(take, own));
    return value - mul(rate, nesterov ? fma(ahead, buffer, own) : buffer);
  }
};

struct Lion {
  Vec keep, take1, take2, rate;
  explicit Lion(const StepFactors& f)
      : keep(splat(f.of[0])), take1(splat(f.of[1])), take2(splat(f.of[2])), rate(splat(f.of[3])) {}
  static constexpr bool kFirst = true, kSecond = false;
  FT_INLINE Vec update(Vec value, Vec grad, Vec& m, Vec&) const {
    const Vec direction = fma(take1, grad - m, m);
    Vec sign = direction < zero() ? splat(-1.0f) : splat(1.0f);
    sign = direction == zero() ? zero() : sign;
    sign = direction != direction ? direction : sign;
    m = fma(take2, grad - m, m);
    return mul(value, keep) - mul(rate, sign);
  }
};

// New values of [begin, begin + count) of a segment; `values` has the old ones, gets the new.
template <class Method>
void update_values(const StepSegment& s, int64_t begin, int64_t count, float* values) {
  const Method method(s.factors);
  const Vec sign = splat(s.factors.sign);
  for (int64_t i = 0; i < count; i += kLanes) {
    const int n = int(lesser(kLanes, count - i));
    const int64_t at = begin + i;
    Vec first = Method::kFirst ? load(s.first + at, n) : zero();
    Vec second = Method::kSecond ? load(s.second + at, n) : zero();
    const Vec value = s.value ? load(s.value + at, n) : load(values + i, n);
    const Vec updated = method.update(value, mul(sign, load(s.grad + at, n)), first, second);
    if (Method::kFirst) store(s.first + at, first, n);
    if (Method::kSecond) store(s.second + at, second, n);
    if (s.value) store(s.value + at, updated, n);
    store(values + i, updated, n);
  }
}

using Update = void (*)(const StepSegment&, int64_t, int64_t, float*);

inline Update choose_update(StepMethod method, const StepSegment& s) {
  if (method == StepMethod::kAdamW) return update_values<AdamW>;
  if (method == StepMethod::kLion) return update_values<Lion>;
  return s.first ? update_values<Momentum> : update_values<SGD>;
}

// Values in float32 into the weight's type; `position` is that of the first among all segments'.
template <class T>
void round_values(const float* values, int64_t count, const int64_t* rng, int64_t position, T* to) {
  if (!rng) return narrow(values, count, to);
  Philox4 words{};
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = position + i;
    if (i == 0 || at % kDropoutGroup == 0)
      words = philox4x32(uint64_t(rng[0]), uint64_t(at) / kDropoutGroup, uint64_t(rng[1]));
    to[i] = round_stochastic<T>(values[i], philox_half(words, int(at % kDropoutGroup)));
  }
}

template <class T>
void step_values(const Step& f, const StepSegment& s, int64_t begin, int64_t end) {
  const Update update = choose_update(f.method, s);
  alignas(kCacheLine) float values[kStepChunk];
  alignas(kCacheLine) T rounded[kStepChunk];
  for (; begin < end; begin += kStepChunk) {
    const int64_t count = lesser(kStepChunk, end - begin);
    if (!s.value) {
      fetch(s.at, s.weight, begin, count, rounded);
      widen(rounded, count, values);
    }
    update(s, begin, count, values);
    round_values(values, count, f.rng, s.first_value + begin, rounded);
    place(s.at, s.weight, begin, count, rounded);
  }
}

// The last segment that begins at or before a value.
inline int64_t segment_of(const Step& f, int64_t value) {
  int64_t low = 0, high = f.count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (f.segments[middle].first_value <= value ? low : high) = middle;
  }
  return low;
}

inline void step(const Step& f) {
  const int64_t share = ceil_div(f.values, kStepTasks * f.threads * kStepChunk) * kStepChunk;
  const int64_t size = greater(kStepLeast, lesser(kStepMost, share));
  parallel_for(f.values < kStepSerial ? 1 : f.threads, ceil_div(f.values, size),
               [&](int64_t task, int) {
                 const int64_t begin = task * size, end = lesser(f.values, begin + size);
                 for (int64_t i = segment_of(f, begin); i < f.count; ++i) {
                   const StepSegment& s = f.segments[i];
                   const int64_t from = greater(0, begin - s.first_value);
                   const int64_t to = lesser(s.at.values(), end - s.first_value);
                   if (to <= 0) break;
                   if (from >= to) continue;
                   if (s.dtype == FT_FLOAT32)
                     step_values<float>(f, s, from, to);
                   else if (s.dtype == FT_BFLOAT16)
                     step_values<bf16>(f, s, from, to);
                   else
                     step_values<fp16>(f, s, from, to);
                 }
               });
}

constexpr StepKernels kStep{step};

}  // namespace
