// Activations rounded to 4 bits within a learned range, and the gradients straight through, for one
// level of the instruction set; see ops/ptq4.md. One pass over x, and over dY.
#include "cpu/vec.inl.hpp"
// After the vocabulary:
#include "cpu/ptq4/quantize.inl.hpp"

namespace {

// Rows of one task, whose sums are added up apart from the others'.
constexpr int64_t kRowsOfPart = 32;

// A row of places where it belongs, in y's dtype; y (m, k) is C-contiguous.
template <class T>
void store_row_of(const FakeQuantize4& f, int64_t m, const float* from) {
  T* const to = static_cast<T*>(f.y) + m * f.x.k;
  if (f.x.perm) {
    for (int64_t j = 0; j < f.x.k; ++j) to[f.x.perm[j]] = from_float<T>(from[j]);
    return;
  }
  for (int64_t j = 0; j < f.x.k; j += kLanes) {
    const int n = int(lesser(kLanes, f.x.k - j));
    store(to + j, load(from + j, n), n);
  }
}

inline void store_row(const FakeQuantize4& f, int64_t m, const float* from) {
  f.x.dtype == FT_FLOAT32    ? store_row_of<float>(f, m, from)
  : f.x.dtype == FT_BFLOAT16 ? store_row_of<bf16>(f, m, from)
                             : store_row_of<fp16>(f, m, from);
}

inline void forward_group(const Range& range, float* x, int64_t n) {
  const Vec scale = splat(range.scale), low = splat(range.low), high = splat(range.high);
  for (int64_t at = 0; at < n; at += kLanes) {
    const int lanes = int(lesser(kLanes, n - at));
    const Vec v = load(x + at, lanes), u = clamp(v / scale, low, high);
    // Of what is no number the codes are none either.
    const Vec y = mul(scale, as_floats(rounded(u)));
    store(x + at, u == u ? y : u, lanes);
  }
}

// dx into x, and what the group adds to the gradients of scale and zero.
inline void backward_group(const Range& range, bool zero_inside, float* x, const float* grad,
                           int64_t n, double* dscale, double* dzero) {
  const Vec scale = splat(range.scale), low = splat(range.low), high = splat(range.high);
  Vec of_scale = zero(), outside = zero();
  for (int64_t at = 0; at < n; at += kLanes) {
    const int lanes = int(lesser(kLanes, n - at));
    const Vec v = load(x + at, lanes) / scale, dy = load(grad + at, lanes);
    const Vec u = clamp(v, low, high);
    // Below and above, u is the limit, an integer; inside it is v.
    const Vec step = u == v ? as_floats(rounded(u)) - v : u;
    of_scale = add(of_scale, v == v ? mul(dy, step) : v);
    outside = add(outside, u == v ? zero() : dy);
    store(x + at, u == v ? dy : v == v ? zero() : v, lanes);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    *dscale += of_scale[lane];
    if (zero_inside) *dzero -= double(range.scale) * outside[lane];
  }
}

inline int64_t groups_of(const FakeQuantize4& f) { return ceil_div(f.x.k, f.group_size); }

// body(group, its range, its first place, its places)
template <class Body>
void for_each_group(const FakeQuantize4& f, const Body& body) {
  for (int64_t g = 0; g < groups_of(f); ++g)
    body(g, range_of(f.range, g), g * f.group_size, lesser(f.group_size, f.x.k - g * f.group_size));
}

inline void fake_quantize4(const FakeQuantize4& f) {
  const ScratchScope scope;
  float* const rows = static_cast<float*>(scratch(Scratch::kWorkers, (f.threads * f.x.k + 1) * 4));
  const int64_t parts = ceil_div(f.x.m, kRowsOfPart);
  parallel_for(f.threads, parts, [&](int64_t part, int worker) {
    float* const x = rows + worker * f.x.k;
    for (int64_t m = part * kRowsOfPart; m < lesser((part + 1) * kRowsOfPart, f.x.m); ++m) {
      load_row(f.x, m, x);
      for_each_group(f, [&](int64_t, const Range& range, int64_t j, int64_t n) {
        forward_group(range, x + j, n);
      });
      store_row(f, m, x);
    }
  });
}

inline void fake_quantize4_backward(const FakeQuantize4& f) {
  const ScratchScope scope;
  float* const rows =
      static_cast<float*>(scratch(Scratch::kWorkers, (f.threads * 2 * f.x.k + 1) * 4));
  const int64_t parts = ceil_div(f.x.m, kRowsOfPart), groups = f.range.groups;
  // [part][gradient][group]
  double* const sums = static_cast<double*>(
      scratch(Scratch::kLowRank, (parts * 2 * groups + 1) * int64_t(sizeof(double))));
  for (int64_t at = 0; at < parts * 2 * groups; ++at) sums[at] = 0;
  parallel_for(f.threads, parts, [&](int64_t part, int worker) {
    float *const x = rows + worker * 2 * f.x.k, *const grad = x + f.x.k;
    double *const dscale = sums + part * 2 * groups, *const dzero = dscale + groups;
    for (int64_t m = part * kRowsOfPart; m < lesser((part + 1) * kRowsOfPart, f.x.m); ++m) {
      load_row(f.x, m, x);
      load_row(f.grad, m, grad);
      for_each_group(f, [&](int64_t g, const Range& range, int64_t j, int64_t n) {
        const int64_t to = groups == 1 ? 0 : g;
        const bool inside = f.range.zero[to] >= 0 && f.range.zero[to] <= 15;
        backward_group(range, inside, x + j, grad + j, n, dscale + to, dzero + to);
      });
      if (f.y) store_row(f, m, x);
    }
  });
  for (int64_t g = 0; g < groups; ++g) {
    double dscale = 0, dzero = 0;
    for (int64_t part = 0; part < parts; ++part) {
      dscale += sums[part * 2 * groups + g];
      dzero += sums[(part * 2 + 1) * groups + g];
    }
    if (f.dscale) f.dscale[g] = float(dscale);
    if (f.dzero) f.dzero[g] = float(dzero);
  }
}

constexpr FakeQuantize4Kernels kFakeQuantize4{fake_quantize4, fake_quantize4_backward};

}  // namespace
