// A linear layer whose weight is int8 with one scale per output, for one level of the instruction
// set: codes are widened as they are packed for the GEMM core, exactly in bfloat16 too, and the
// scale multiplies the finished sum. In dX, whose sum runs over the outputs, it multiplies dY.
#include "cpu/vec.inl.hpp"

// What the core's templates find for int8 operands; the vocabulary lacks them.
namespace {

FT_INLINE Vec load(const int8_t* p, int n) {
#if FT_LANES == 16
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), p)));
#else
#if FT_LANES == 8
  if (n == kLanes)
    return _mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#endif
  float values[kLanes] = {};
  for (int lane = 0; lane < n; ++lane) values[lane] = float(p[lane]);
  return load(values);
#endif
}

#if FT_BF16_DOT
// A float of 8 bits is a bfloat16: its upper half.
FT_INLINE Vec load_pairs(const int8_t* p, int n) {
  const __m256i bytes = _mm256_maskz_loadu_epi8(__mmask32((uint64_t(1) << n) - 1), p);
  const auto floats = [](__m128i low) {
    return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(low)));
  };
  const __m512i low = floats(_mm256_castsi256_si128(bytes));
  const __m512i high = floats(_mm256_extracti128_si256(bytes, 1));
  const __m512i both =
      _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_srli_epi32(low, 16))),
                         _mm512_cvtepi32_epi16(_mm512_srli_epi32(high, 16)), 1);
  return _mm512_castsi512_ps(both);
}
#endif

}  // namespace

// After the vocabulary:
#include "cpu/dropout.inl.hpp"
#include "cpu/gemm.inl.hpp"

namespace {

inline bool multiplies_pairs(const Int8Linear& f) { return FT_BF16_DOT && f.dtype == FT_BFLOAT16; }

// The codes as an operand of the core.
inline Operand codes_of(const Int8Linear& f, int64_t line_stride, int64_t depth_stride) {
  Operand a = dense(f.codes, line_stride, depth_stride);
  a.short_runs = depth_stride != 1;
  a.value_bytes = 1;
  if (multiplies_pairs(f)) {
    a.pack = dense_packer<int8_t, FT_BF16_DOT>(a);
    a.multiply = in_place<int8_t, FT_BF16_DOT>(a);
  } else {
    a.pack = dense_packer<int8_t, false>(a);
    a.multiply = in_place<int8_t, false>(a);
  }
  return a;
}

// ---- forward -------------------------------------------------------------------------------

// y = tile * scale + bias along columns.
template <class T>
void store_scaled(const Result& c, const float* tile, int64_t pitch, int64_t i, int64_t j, int rows,
                  int columns) {
  const Int8Linear& f = *static_cast<const Int8Linear*>(c.data);
  const T* const bias = static_cast<const T*>(f.bias);
  for (int row = 0; row < rows; ++row, tile += pitch) {
    T* const to = static_cast<T*>(f.y) + (i + row) * f.n + j;
    for (int column = 0; column < columns; column += kLanes) {
      const int n = int(lesser(kLanes, columns - column));
      const Vec b = bias ? load(bias + j + column, n) : zero();
      store(to + column, fma(load(tile + column), load(f.scale + j + column, n), b), n);
    }
  }
}

inline void int8_forward(const Int8Linear& f) {
  const ScratchScope scope;
  Operand rows = dense(f.x, f.x_stride_m, f.x_stride_k);
  choose_packer(rows, f.dtype, multiplies_pairs(f));
  const Product product{rows,
                        codes_of(f, f.codes_stride_n, f.codes_stride_k),
                        {f.k, multiplies_pairs(f), kDepthItems},
                        1.0f,
                        nullptr,
                        0};
  const auto store = f.dtype == FT_FLOAT32    ? store_scaled<float>
                     : f.dtype == FT_BFLOAT16 ? store_scaled<bf16>
                                              : store_scaled<fp16>;
  gemm(f.m, f.n, &product, 1, {const_cast<Int8Linear*>(&f), 0, 0, store, nullptr, false},
       f.threads);
}

// ---- backward ------------------------------------------------------------------------------

// Rows of dY times the scales, rounded to bfloat16 where pairs are multiplied, else float32.
template <class T, bool kPairs>
void pack_scaled_grad(const Operand& a, int64_t line, int lines, int64_t begin, int64_t end,
                      float* strip) {
  const Int8Linear& f = *static_cast<const Int8Linear*>(a.data);
  constexpr int kPerItem = kPairs ? 2 : 1, kRun = 2 * kLanes;
  const auto scaled = [&](auto* values, int64_t p, int n) {
    for (int i = 0; i < lines; ++i) {
      const T* from =
          static_cast<const T*>(f.grad) + (line + i) * f.grad_stride_m + p * f.grad_stride_n;
      for (int q = 0; q < n; q += kLanes) {
        const int width = int(lesser(kLanes, n - q));
        T gathered[kLanes];
        const T* run = from + q;
        if (f.grad_stride_n != 1) {
          for (int lane = 0; lane < width; ++lane)
            gathered[lane] = from[(q + lane) * f.grad_stride_n];
          run = gathered;
        }
        store(values + i * kRun + q, mul(load(run, width), load(f.scale + p + q, width)), width);
      }
    }
  };
  for (int64_t p = begin; p < end; p += kRun, strip += kRun / kPerItem * kLanes) {
    const int n = int(lesser(kRun, end - p));
    if constexpr (kPairs) {
      bf16 values[kLanes * kRun];
      scaled(values, p, n);
      pack_lines<bf16, FT_BF16_DOT, false>(dense(values, kRun, 1), 0, lines, 0, n, strip);
    } else {
      float values[kLanes * kRun];
      scaled(values, p, n);
      pack_lines<float, false, false>(dense(values, kRun, 1), 0, lines, 0, n, strip);
    }
  }
}

inline void int8_dx(const Int8Linear& f) {
  Operand rows = dense(&f, 0, 1);
  rows.pack = f.dtype == FT_FLOAT32   ? pack_scaled_grad<float, false>
              : f.dtype == FT_FLOAT16 ? pack_scaled_grad<fp16, false>
              : multiplies_pairs(f)   ? pack_scaled_grad<bf16, FT_BF16_DOT>
                                      : pack_scaled_grad<bf16, false>;
  const Product product{rows,
                        codes_of(f, f.codes_stride_k, f.codes_stride_n),
                        {f.n, multiplies_pairs(f), kDepthItems},
                        1.0f,
                        nullptr,
                        0};
  gemm(f.m, f.k, &product, 1, result(f.dx, f.dtype, f.k, 1), f.threads);
}

// Sums of dY^T x times the codes: outputs whose partial sums are made at once, and the inputs that
// one partial sum adds up, which the core's blocks are multiples of.
constexpr int64_t kOutputsAtOnce = 2048;
constexpr int kInputsOfPart = kTileColumns;

struct CodeSums {
  const Int8Linear* call;
  int64_t first, outputs;  // the first output, and how many
  float* parts;            // [part of the inputs][output]
};

inline void add_up_codes(const Result& c, const float* tile, int64_t pitch, int64_t i, int64_t j,
                         int rows, int columns) {
  const CodeSums& s = *static_cast<const CodeSums*>(c.data);
  const Int8Linear& f = *s.call;
  for (int row = 0; row < rows; ++row)
    for (int first = 0; first < columns; first += kInputsOfPart) {
      Vec sum = zero();
      for (int column = first; column < lesser(columns, first + kInputsOfPart); column += kLanes) {
        const int n = int(lesser(kLanes, columns - column));
        const int8_t* from =
            f.codes + (s.first + i + row) * f.codes_stride_n + (j + column) * f.codes_stride_k;
        int8_t gathered[kLanes];
        if (f.codes_stride_k != 1) {
          for (int lane = 0; lane < n; ++lane) gathered[lane] = from[lane * f.codes_stride_k];
          from = gathered;
        }
        sum = fma(load(tile + row * pitch + column, n), load(from, n), sum);
      }
      float lanes[kLanes], total = 0;
      store(lanes, sum);
      for (float lane : lanes) total += lane;
      s.parts[(j + first) / kInputsOfPart * s.outputs + i + row] = total;
    }
}

inline void int8_dscale(const Int8Linear& f) {
  const int64_t parts = ceil_div(f.k, kInputsOfPart);
  for (int64_t first = 0; first < f.n; first += kOutputsAtOnce) {
    const int64_t outputs = lesser(kOutputsAtOnce, f.n - first);
    CodeSums sums{&f, first, outputs,
                  static_cast<float*>(
                      scratch(Scratch::kLowRank, (parts * outputs + 1) * int64_t(sizeof(float))))};
    const Operand grad_t =
        dense(advanced(f.grad, f.dtype, first * f.grad_stride_n), f.grad_stride_n, f.grad_stride_m);
    const Product sum =
        product(grad_t, f.dtype, dense(f.x, f.x_stride_k, f.x_stride_m), f.dtype, f.m);
    gemm(outputs, f.k, &sum, 1, {&sums, 0, 0, add_up_codes, nullptr, false}, f.threads);
    for (int64_t n = 0; n < outputs; ++n) {
      double total = 0;
      for (int64_t part = 0; part < parts; ++part) total += sums.parts[part * outputs + n];
      f.dscale[first + n] = float(total);
    }
  }
}

inline void int8_dbias(const Int8Linear& f) {
  // A row of ones times grad, so that the sum has the core's order and small error.
  const uint16_t bf16_one = 0x3f80, fp16_one = 0x3c00;
  const float one = 1.0f;
  const void* ones = f.dtype == FT_FLOAT32    ? static_cast<const void*>(&one)
                     : f.dtype == FT_BFLOAT16 ? static_cast<const void*>(&bf16_one)
                                              : static_cast<const void*>(&fp16_one);
  const Product sum =
      product(dense(ones, 0, 0), f.dtype, dense(f.grad, f.grad_stride_n, f.grad_stride_m), f.dtype,
              f.m, kShortDepthItems);
  gemm(1, f.n, &sum, 1, result(f.dbias, f.dtype, f.n, 1), f.threads);
}

inline void int8_backward(const Int8Linear& f) {
  const ScratchScope scope;
  if (f.dx) int8_dx(f);
  if (f.dscale) int8_dscale(f);
  if (f.dbias) int8_dbias(f);
}

constexpr Int8LinearKernels kInt8Linear{int8_forward, int8_backward};

}  // namespace
