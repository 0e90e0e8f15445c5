// Sums over matrices that are never written, for one level of the instruction set: the norms of the
// rows of W + s B A, the sums of |U V^T - W| and their gradients; and columns times a scale.
//
// A tile of the product comes from the GEMM core, and what the core stores is the tile's sums, or
// its signs for some rows at a time, which are the operand of the next product.
#include "cpu/vec.inl.hpp"
// After the vocabulary:
#include "cpu/dropout.inl.hpp"
#include "cpu/gemm.inl.hpp"

namespace {

// The first n <= kLanes of values so many elements apart.
template <class T>
FT_INLINE Vec load_strided(const T* p, int64_t stride, int n) {
  if (stride == 1) return load(p, n);
  T values[kLanes];
  for (int lane = 0; lane < n; ++lane) values[lane] = p[lane * stride];
  return load(values, n);
}

FT_INLINE Vec minus(Vec a, Vec b) { return a - b; }

// ---- sums of rows --------------------------------------------------------------------------

// Rows whose partial sums are made at once.
constexpr int64_t kSummedRows = 2048;
// Columns that one partial sum adds up: what the core's blocks are multiples of.
constexpr int kSummedColumns = kTileColumns;

struct Magnitude {
  static FT_INLINE Vec of(Vec product, Vec w) {
    const Vec v = product - w;
    return v < zero() ? minus(zero(), v) : v;
  }
};
struct Square {
  static FT_INLINE Vec of(Vec product, Vec w) {
    const Vec v = add(product, w);
    return mul(v, v);
  }
};

// What a tile is added up with, and where its sums go: [group of columns][row].
struct RowSums {
  float* partial;
  int64_t rows;
  const void* w;  // of the first row, or null
  int64_t w_stride_n, w_stride_k;
};

// The sums of a tile's rows over every group of columns. A row's sum over lanes is that of the
// columns of kLanes such rows, transposed.
template <class T, class Term>
void add_up_rows(const Result& c, const float* tile, int64_t pitch, int64_t i, int64_t j, int rows,
                 int columns) {
  const RowSums& s = *static_cast<const RowSums*>(c.data);
  const T* const w = static_cast<const T*>(s.w);
  for (int row = 0; row < rows; row += kLanes) {
    const int height = int(lesser(kLanes, rows - row));
    for (int first = 0; first < columns; first += kSummedColumns) {
      Vec sums[kLanes];
      for (int at = 0; at < kLanes; ++at) {
        sums[at] = zero();
        if (at >= height) continue;
        for (int column = first; column < lesser(columns, first + kSummedColumns);
             column += kLanes) {
          const int n = int(lesser(kLanes, columns - column));
          const Vec product = load(tile + (row + at) * pitch + column, n);
          const T* from = w + (i + row + at) * s.w_stride_n + (j + column) * s.w_stride_k;
          const Vec subtrahend = w ? load_strided(from, s.w_stride_k, n) : zero();
          sums[at] = add(sums[at], Term::of(product, subtrahend));
        }
      }
      transpose(sums);
#pragma GCC unroll 4
      for (int half = kLanes / 2; half; half /= 2)
        for (int at = 0; at < half; ++at) sums[at] = add(sums[at], sums[at + half]);
      store(s.partial + (j + first) / kSummedColumns * s.rows + i + row, sums[0], height);
    }
  }
}

// The sums of the rows of [groups][rows] partial sums, a few groups from zero at a time.
inline void add_up_groups(const float* partial, int64_t groups, int64_t rows, float* sums) {
  constexpr int64_t kTogether = 16;
  for (int64_t row = 0; row < rows; row += kLanes) {
    const int n = int(lesser(kLanes, rows - row));
    Vec total = zero();
    for (int64_t first = 0; first < groups; first += kTogether) {
      Vec part = zero();
      for (int64_t group = first; group < lesser(groups, first + kTogether); ++group)
        part = add(part, load(partial + group * rows + row, n));
      total = add(total, part);
    }
    store(sums + row, total, n);
  }
}

// sums_n = sum_k Term(q's product, W): q is (rows, columns) over its depth; W (n, k) of a dtype.
template <class Term>
void sum_rows(const Product& q, int64_t n, int64_t k, int64_t row_stride, int32_t rows_dtype,
              const void* w, int32_t dtype, int64_t w_stride_n, int64_t w_stride_k, float* sums,
              int threads) {
  const auto store = dtype == FT_FLOAT32    ? add_up_rows<float, Term>
                     : dtype == FT_BFLOAT16 ? add_up_rows<bf16, Term>
                                            : add_up_rows<fp16, Term>;
  const int64_t groups = ceil_div(k, kSummedColumns);
  for (int64_t i = 0; i < n; i += kSummedRows) {
    const int64_t rows = lesser(kSummedRows, n - i);
    RowSums part{static_cast<float*>(
                     scratch(Scratch::kLowRank, (groups * rows + 1) * int64_t(sizeof(float)))),
                 rows, advanced(w, dtype, i * w_stride_n), w_stride_n, w_stride_k};
    Product own = q;
    own.rows.data = advanced(q.rows.data, rows_dtype, i * row_stride);
    gemm(rows, k, &own, 1, {&part, 0, 0, store, nullptr, false}, threads);
    add_up_groups(part.partial, groups, rows, sums + i);
  }
}

inline void dora_norm(const DoraNorm& f) {
  const ScratchScope scope;
  const Product ba = scaled(product(dense(f.lora_b, f.r, 1), f.adapter_dtype,
                                    dense(f.lora_a, 1, f.k), f.adapter_dtype, f.r),
                            f.scaling);
  sum_rows<Square>(ba, f.n, f.k, f.r, f.adapter_dtype, f.weight, f.dtype, f.weight_stride_n,
                   f.weight_stride_k, f.norm, f.threads);
  for (int64_t n = 0; n < f.n; ++n) f.norm[n] = __builtin_sqrtf(f.norm[n]);
}

inline void abs_row_sums(const AbsRowSums& f) {
  const ScratchScope scope;
  const Product uv = product(dense(f.u, f.u_stride_n, f.u_stride_r), f.dtype,
                             dense(f.v, f.v_stride_k, f.v_stride_r), f.dtype, f.r);
  sum_rows<Magnitude>(uv, f.n, f.k, f.u_stride_n, f.dtype, f.w, f.dtype, f.w_stride_n, f.w_stride_k,
                      f.sums, f.threads);
}

// ---- their gradient ------------------------------------------------------------------------

// Rows whose signs are written at once: they stay in the cache for the two products that read them.
constexpr int64_t kSignedRows = 224;

// Where Z = sign(U V^T - W) * grad of some rows goes, as float32, and -Z.
struct Signs {
  float* z;  // (rows, k)
  void* dw;  // or null
  const float* grad;
  const void* w;
  int64_t k, w_stride_n, w_stride_k;
};

template <class T>
void store_signs(const Result& c, const float* tile, int64_t pitch, int64_t i, int64_t j, int rows,
                 int columns) {
  const Signs& s = *static_cast<const Signs*>(c.data);
  for (int row = 0; row < rows; ++row) {
    const int64_t at = i + row;
    const Vec grad = splat(s.grad[at]);
    for (int column = 0; column < columns; column += kLanes) {
      const int n = int(lesser(kLanes, columns - column));
      Vec v = load(tile + row * pitch + column, n);
      if (s.w)
        v = v - load_strided(
                    static_cast<const T*>(s.w) + at * s.w_stride_n + (j + column) * s.w_stride_k,
                    s.w_stride_k, n);
      const Vec z = (v > zero() ? grad : zero()) - (v < zero() ? grad : zero());
      store(s.z + at * s.k + j + column, z, n);
      if (s.dw) store(static_cast<T*>(s.dw) + at * s.k + j + column, minus(zero(), z), n);
    }
  }
}

template <class T>
void store_transposed(const float* from, int64_t rows, int64_t columns, T* to) {
  for (int64_t column = 0; column < columns; ++column)
    for (int64_t row = 0; row < rows; ++row)
      to[column * rows + row] = from_float<T>(from[row * columns + column]);
}

inline void abs_row_sums_backward(const AbsRowSums& f) {
  const ScratchScope scope;
  const auto store = f.dtype == FT_FLOAT32    ? store_signs<float>
                     : f.dtype == FT_BFLOAT16 ? store_signs<bf16>
                                              : store_signs<fp16>;
  float* const z = static_cast<float*>(
      scratch(Scratch::kSharedRows, (kSignedRows * f.k + 1) * int64_t(sizeof(float))));
  float* const dv =  // dv^T, (r, k)
      static_cast<float*>(scratch(Scratch::kLowRank, (f.r * f.k + 1) * int64_t(sizeof(float))));
  if (!f.n) memset(dv, 0, size_t(f.r * f.k) * sizeof(float));
  for (int64_t i = 0; i < f.n; i += kSignedRows) {
    const int64_t rows = lesser(kSignedRows, f.n - i);
    const void* u = advanced(f.u, f.dtype, i * f.u_stride_n);
    Signs signs{z,           f.dw ? advanced(f.dw, f.dtype, i * f.k) : nullptr,
                f.grad + i,  advanced(f.w, f.dtype, i * f.w_stride_n),
                f.k,         f.w_stride_n,
                f.w_stride_k};
    const Product uv = product(dense(u, f.u_stride_n, f.u_stride_r), f.dtype,
                               dense(f.v, f.v_stride_k, f.v_stride_r), f.dtype, f.r);
    gemm(rows, f.k, &uv, 1, {&signs, 0, 0, store, nullptr, false}, f.threads);
    if (f.du) {
      const Product zv = product(dense(f.v, f.v_stride_r, f.v_stride_k), f.dtype, dense(z, f.k, 1),
                                 FT_FLOAT32, f.k, kShortDepthItems);
      gemm(f.r, rows, &zv, 1, result(advanced(f.du, f.dtype, i * f.r), f.dtype, 1, f.r), f.threads);
    }
    if (f.dv) {
      const Product zu = product(dense(u, f.u_stride_r, f.u_stride_n), f.dtype, dense(z, 1, f.k),
                                 FT_FLOAT32, rows, kShortDepthItems);
      Result sum = result(dv, FT_FLOAT32, f.k, 1);
      sum.accumulate = i > 0;
      gemm(f.r, f.k, &zu, 1, sum, f.threads);
    }
  }
  if (!f.dv) return;
  if (f.dtype == FT_FLOAT32)
    store_transposed(dv, f.r, f.k, static_cast<float*>(f.dv));
  else if (f.dtype == FT_BFLOAT16)
    store_transposed(dv, f.r, f.k, static_cast<bf16*>(f.dv));
  else
    store_transposed(dv, f.r, f.k, static_cast<fp16*>(f.dv));
}

// ---- columns times a scale -----------------------------------------------------------------

// A task has so many rows, and of each so many columns at a time, whose sums stay in the cache.
constexpr int64_t kScaledRows = 64, kScaledColumns = 1024;

template <class T>
void scale_rows(const ScaleColumns& f) {
  const T* bias = static_cast<const T*>(f.bias);
  parallel_for(f.m * f.n < kSerialWork ? 1 : f.threads, ceil_div(f.m, kScaledRows),
               [&](int64_t task, int) {
                 const int64_t end = lesser(f.m, (task + 1) * kScaledRows);
                 for (int64_t row = task * kScaledRows; row < end; ++row) {
                   const T* x = static_cast<const T*>(f.x) + row * f.x_stride_m;
                   T* y = static_cast<T*>(f.y) + row * f.n;
                   for (int64_t column = 0; column < f.n; column += kLanes) {
                     const int n = int(lesser(kLanes, f.n - column));
                     const Vec v = load_strided(x + column * f.x_stride_n, f.x_stride_n, n);
                     const Vec b = bias ? load(bias + column, n) : zero();
                     store(y + column, fma(v, load(f.scale + column, n), b), n);
                   }
                 }
               });
}

inline void scale_columns(const ScaleColumns& f) {
  if (f.dtype == FT_FLOAT32)
    scale_rows<float>(f);
  else if (f.dtype == FT_BFLOAT16)
    scale_rows<bf16>(f);
  else
    scale_rows<fp16>(f);
}

// One task's rows: dx, and the sums over them of grad * x and of grad, (2, n).
template <class T>
void scale_rows_backward(const ScaleColumns& f, int64_t task, float* sums) {
  const int64_t first = task * kScaledRows, end = lesser(f.m, first + kScaledRows);
  float *const dscale = sums, *const dbias = sums + f.n;
  for (int64_t at = 0; at < 2 * f.n; ++at) sums[at] = 0.0f;
  for (int64_t begin = 0; begin < f.n; begin += kScaledColumns)
    for (int64_t row = first; row < end; ++row) {
      const T* grad = static_cast<const T*>(f.x) + row * f.x_stride_m;
      const T* input = static_cast<const T*>(f.input) + row * f.input_stride_m;
      T* dx = f.y ? static_cast<T*>(f.y) + row * f.n : nullptr;
      const int64_t behind = lesser(f.n, begin + kScaledColumns);
      for (int64_t column = begin; column < behind; column += kLanes) {
        const int n = int(lesser(kLanes, behind - column));
        const Vec g = load_strided(grad + column * f.x_stride_n, f.x_stride_n, n);
        if (dx) store(dx + column, mul(g, load(f.scale + column, n)), n);
        if (f.dscale) {
          const Vec x = load_strided(input + column * f.input_stride_n, f.input_stride_n, n);
          store(dscale + column, fma(g, x, load(dscale + column, n)), n);
        }
        if (f.dbias) store(dbias + column, add(load(dbias + column, n), g), n);
      }
    }
}

inline void scale_columns_backward(const ScaleColumns& f) {
  const ScratchScope scope;
  const int64_t tasks = ceil_div(f.m, kScaledRows), stride = 2 * f.n;
  float* const partial = static_cast<float*>(
      scratch(Scratch::kLowRank, (tasks * stride + 1) * int64_t(sizeof(float))));
  const auto rows = f.dtype == FT_FLOAT32    ? scale_rows_backward<float>
                    : f.dtype == FT_BFLOAT16 ? scale_rows_backward<bf16>
                                             : scale_rows_backward<fp16>;
  parallel_for(f.m * f.n < kSerialWork ? 1 : f.threads, tasks,
               [&](int64_t task, int) { rows(f, task, partial + task * stride); });
  for (int64_t column = 0; column < f.n; column += kLanes) {
    const int n = int(lesser(kLanes, f.n - column));
    Vec dscale = zero(), dbias = zero();
    for (int64_t task = 0; task < tasks; ++task) {
      dscale = add(dscale, load(partial + task * stride + column, n));
      dbias = add(dbias, load(partial + task * stride + f.n + column, n));
    }
    if (f.dscale) store(f.dscale + column, dscale, n);
    if (!f.dbias) continue;
    if (f.dtype == FT_FLOAT32)
      store(static_cast<float*>(f.dbias) + column, dbias, n);
    else if (f.dtype == FT_BFLOAT16)
      store(static_cast<bf16*>(f.dbias) + column, dbias, n);
    else
      store(static_cast<fp16*>(f.dbias) + column, dbias, n);
  }
}

constexpr SumKernels kSums{dora_norm, abs_row_sums, abs_row_sums_backward, scale_columns,
                           scale_columns_backward};

}  // namespace
