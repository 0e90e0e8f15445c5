// What the masked family's kernels share on host and device: the parts of a weight, the numbers of
// an optimizer step, and the scores of a selection.
#pragma once
#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "fastft/api.h"
#include "fastft/dtype.h"
#include "fastft/status.h"

namespace fastft {

// The trained part of a weight (N, K): equal rectangles, sorted by where they begin.
//
// Elements are rectangles of 1 x 1, rows of 1 x K, columns of N x 1, blocks of their own size, the
// heads of a projection of head_size x K or N x head_size, a whole weight of N x K. Values stand
// rectangle by rectangle, each row after row.
struct Rectangles {
  const void* index;  // the flat offset of each rectangle's first element, ascending
  int64_t count, rows, columns;
  int64_t stride;       // K
  int64_t size;         // N * K
  int64_t index_bytes;  // 4 or 8

  FT_HOST_DEVICE int64_t area() const { return rows * columns; }
  FT_HOST_DEVICE int64_t values() const { return count * area(); }
  FT_HOST_DEVICE int64_t start(int64_t rectangle) const {
    return index_bytes == 4 ? static_cast<const int32_t*>(index)[rectangle]
                            : static_cast<const int64_t*>(index)[rectangle];
  }
};

FT_HOST_DEVICE Rectangles rectangles_of(const ft_masked_segment& s) {
  return {s.index, s.count, s.rows, s.columns, s.stride, s.size, s.index_bytes};
}
// What is left out of a tensor to select from, as elements of its one row.
FT_HOST_DEVICE Rectangles excluded_of(const ft_masked_scored& s) {
  return {s.exclude, s.excluded, 1, 1, s.size > 0 ? s.size : 1, s.size, s.exclude_bytes};
}

// Fails unless the sizes are some; the index is not read.
inline int check_sizes(const char* name, const Rectangles& r) {
  FT_CHECK(r.index_bytes == 4 || r.index_bytes == 8, "%s: index of %lld bytes", name,
           static_cast<long long>(r.index_bytes));
  FT_CHECK(r.count >= 0 && r.rows >= 1 && r.columns >= 1 && r.stride >= 0 && r.size >= 0,
           "%s: %lld rectangles of %lld x %lld in rows of %lld are no sizes", name,
           static_cast<long long>(r.count), static_cast<long long>(r.rows),
           static_cast<long long>(r.columns), static_cast<long long>(r.stride));
  if (!r.count) return 0;
  FT_CHECK(r.stride >= 1 && r.stride % r.columns == 0 && r.size % (r.stride * r.rows) == 0,
           "%s: rectangles of %lld x %lld do not tile rows of %lld of %lld elements", name,
           static_cast<long long>(r.rows), static_cast<long long>(r.columns),
           static_cast<long long>(r.stride), static_cast<long long>(r.size));
  return 0;
}

// ---- an optimizer step ---------------------------------------------------------------------

enum class StepMethod : int32_t { kAdamW, kSGD, kLion, kCount };

// What a step multiplies by, made once from the hyperparameters. By method, in this order:
//   AdamW  1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1^t),
//          sqrt(1 - beta2^t), eps
//   SGD    weight_decay, momentum, 1 - dampening, nesterov, lr, momentum; the first step has no
//          buffer yet: the first momentum is then 0, and dampening
//   Lion   1 - lr * weight_decay, 1 - beta1, 1 - beta2, lr
struct StepFactors {
  float sign;  // of the gradient
  float of[7];
};
static_assert(sizeof(StepFactors) == FT_STEP_FACTORS * sizeof(float), "as api.h says");

// From FT_STEP_HYPERS numbers, see api.h.
inline StepFactors step_factors(StepMethod method, const double* h) {
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

inline int check_step(const char* name, int64_t count, int32_t method) {
  FT_CHECK(method >= 0 && method < int32_t(StepMethod::kCount), "%s: unknown method %d", name,
           method);
  FT_CHECK(count >= 0, "%s: %lld segments", name, static_cast<long long>(count));
  return 0;
}

inline int check_segment(const char* name, const ft_masked_segment& s, StepMethod method) {
  FT_CHECK(s.dtype >= FT_FLOAT32 && s.dtype <= FT_FLOAT16, "%s: unknown dtype code %lld", name,
           static_cast<long long>(s.dtype));
  if (!s.count) return 0;
  FT_CHECK(s.weight && s.grad && s.index, "%s: a segment without weight, gradient or index", name);
  FT_CHECK(method == StepMethod::kSGD || s.first, "%s: a segment without state", name);
  FT_CHECK(method != StepMethod::kAdamW || s.second, "%s: a segment without second moment", name);
  return 0;
}

// ---- a selection ---------------------------------------------------------------------------

enum class Score : int32_t {
  kMagnitude,   // |a|
  kSquare,      // a^2
  kValue,       // a
  kProduct,     // |a b|
  kMovement,    // -a b
  kDifference,  // |a - b|
  kScaled,      // |a| b, b one float per column
  kRandom,      // a word of Philox by position
  kCount
};

}  // namespace fastft
