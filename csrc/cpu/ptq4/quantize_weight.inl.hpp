// Round-to-nearest with a clip search, and half-quadratic quantization, for one level of the
// instruction set.
//
// A lane is a group: kLanes groups of one length are read once, transposed into a scratch buffer
// that stays in the cache, and searched there with no sum across lanes. A task owns whole rows, so
// that no two write halves of one byte. Traffic: each weight is read once and each code is written
// once; the candidates and the iterations in between cost arithmetic alone.
//
// Numerics: all in float32. The scale is rounded to the dtype it is stored in before the first code
// is made of it, so that the codes are the nearest ones of what will be read. Divisions and
// roundings are IEEE's and half to even; nothing here can be contracted across a rounding.
#include "cpu/vec.inl.hpp"

namespace {

typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));

constexpr float kInfinity = __builtin_inff();
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bit of a fraction
constexpr int64_t kSumBlock = 64;        // terms that are added up one after the other
constexpr int kCodesPerWord = 8;

FT_INLINE Ints bits_of(Vec v) { return reinterpret_cast<Ints>(v); }
FT_INLINE Vec of_bits(Ints v) { return reinterpret_cast<Vec>(v); }
FT_INLINE Vec smaller(Vec a, Vec b) { return a < b ? a : b; }
FT_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }
FT_INLINE Vec magnitude(Vec v) { return of_bits(bits_of(v) & 0x7fffffff); }
// Half to even, of |v| below 2^22; what is larger stays about as large.
FT_INLINE Vec rounded(Vec v) { return (v + splat(kRounder)) - splat(kRounder); }
FT_INLINE Vec clamped(Vec v, float low, float high) {
  return smaller(larger(v, splat(low)), splat(high));
}
FT_INLINE Words code_bits(Vec code) {  // of an integer from 0 to 15
  return reinterpret_cast<Words>(bits_of(code + splat(kRounder))) & 15u;
}

// log2 of a normal, positive v to 1e-7, and 2^v to 1e-7 relative for |v| below 126: polynomials
// through the Chebyshev points of [sqrt(1/2), sqrt(2)] and [-1/2, 1/2].
FT_INLINE Vec log2_of(Vec v) {
  const Ints shifted = bits_of(v) - 0x3f3504f3;  // sqrt(1/2): the mantissa's range starts there
  const Ints exponent = shifted >> 23;
  const Vec x = of_bits((shifted & 0x7fffff) + 0x3f3504f3) - splat(1.0f);
  Vec p = splat(-0.14620353281497955f);
  p = fma(p, x, splat(0.2342098504304886f));
  p = fma(p, x, splat(-0.24882180988788605f));
  p = fma(p, x, splat(0.28707560896873474f));
  p = fma(p, x, splat(-0.36024197936058044f));
  p = fma(p, x, splat(0.4809240400791168f));
  p = fma(p, x, splat(-0.721352756023407f));
  p = fma(p, x, splat(1.442694902420044f));
  return fma(p, x, __builtin_convertvector(exponent, Vec));
}
FT_INLINE Vec exp2_of(Vec v) {
  const Vec shifted = v + splat(kRounder), whole = shifted - splat(kRounder), x = v - whole;
  Vec p = splat(0.0013400432653725147f);
  p = fma(p, x, splat(0.009676037356257439f));
  p = fma(p, x, splat(0.05550327152013779f));
  p = fma(p, x, splat(0.2402210682630539f));
  p = fma(p, x, splat(0.6931471824645996f));
  p = fma(p, x, splat(1.0000001192092896f));
  return of_bits(bits_of(p) + (bits_of(shifted) << 23));
}

// Rounded to a dtype and back; what is beyond float16 becomes its largest number.
template <class T>
FT_INLINE Vec stored_as(Vec v) {
  T values[kLanes];
  store(values, v, kLanes);
  return load(values, kLanes);
}
FT_INLINE Vec stored(Vec v, int32_t dtype) {
  if (dtype == FT_BFLOAT16) return stored_as<bf16>(v);
  if (dtype == FT_FLOAT16) return stored_as<fp16>(clamped(v, -65504.0f, 65504.0f));
  return v;
}
// A scale as it is stored: never 0, and within float16's range where it is one of those.
FT_INLINE Vec stored_scale(Vec v, int32_t dtype) {
  return stored(larger(v, splat(dtype == FT_FLOAT16 ? 0x1p-24f : 0x1p-126f)), dtype);
}

// ---- groups ------------------------------------------------------------------------------------

// The groups of one batch: lane i is group first + i of those of this length in the task's rows.
struct Batch {
  int64_t row, column;  // of the first group, from the task's first row
  int64_t length, per_row, step;
  int count;
};

struct Place {
  int64_t row, column;
};
FT_INLINE Place place(const Batch& b, int lane) {
  const int64_t index = b.column / b.step + lane;  // tail groups: per_row is 1
  if (b.per_row == 1) return {b.row + lane, b.column};
  return {b.row + index / b.per_row, index % b.per_row * b.step};
}

// values[j] holds the j-th weight of every group. Lanes beyond the last group repeat it.
template <class T>
void read_groups(const Batch& b, const T* rows, int64_t stride, float* values) {
  const T* from[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const Place p = place(b, lane < b.count ? lane : b.count - 1);
    from[lane] = rows + p.row * stride + p.column;
  }
  for (int64_t j = 0; j < b.length; j += kLanes) {
    const int width = int(lesser(kLanes, b.length - j));
    Vec block[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) block[lane] = load(from[lane] + j, width);
    transpose(block);
    for (int at = 0; at < width; ++at) store(values + (j + at) * kLanes, block[at]);
  }
}

struct Range {
  Vec low, high, largest;
  Vec poison;  // 0, or NaN where a weight is not finite or the range is not
};
// The groups' ranges. The weights of a poisoned one become zeros.
FT_INLINE Range range_of(float* values, int64_t length) {
  Range r{splat(kInfinity), splat(-kInfinity), zero(), zero()};
  for (int64_t j = 0; j < length; ++j) {
    const Vec v = load(values + j * kLanes);
    r.low = smaller(v, r.low);
    r.high = larger(v, r.high);
    r.poison = r.poison + v * zero();
  }
  r.poison = r.poison + (larger(r.high, zero()) - smaller(r.low, zero())) * zero();
  const auto sound = r.poison == zero();
  bool all_sound = true;
  for (int lane = 0; lane < kLanes; ++lane) all_sound = all_sound && sound[lane];
  if (!all_sound) {
    for (int64_t j = 0; j < length; ++j) {
      const Vec v = load(values + j * kLanes);
      store(values + j * kLanes, sound ? v : zero());
    }
    r.low = sound ? r.low : zero();
    r.high = sound ? r.high : zero();
    r.poison = sound ? zero() : splat(__builtin_nanf(""));
  }
  r.largest = larger(magnitude(r.low), magnitude(r.high));
  return r;
}

// Where a task's codes go: words of eight codes per lane, then bytes per group.
struct Codes {
  uint32_t* words;  // [ceil(length / 8)][kLanes]
  Words word{};
  FT_INLINE void put(int64_t j, Words code) {
    const int at = int(j % kCodesPerWord);
    word = at ? word | code << (4 * at) : code;
    memcpy(words + j / kCodesPerWord * kLanes, &word, sizeof word);
  }
};

// The task's rows of codes start as zeros.
inline void write_codes(const Batch& b, const uint32_t* words, uint8_t* rows, int64_t pitch) {
  for (int lane = 0; lane < b.count; ++lane) {
    const Place p = place(b, lane);
    uint8_t* to = rows + p.row * pitch;
    if (p.column % 2 == 0 && b.length % 2 == 0) {
      to += p.column / 2;
      for (int64_t j = 0; j < b.length; j += kCodesPerWord) {
        const uint32_t word = words[j / kCodesPerWord * kLanes + lane];
        memcpy(to + j / 2, &word, size_t(lesser(kCodesPerWord, b.length - j) / 2));
      }
      continue;
    }
    for (int64_t j = 0; j < b.length; ++j) {
      const uint32_t word = words[j / kCodesPerWord * kLanes + lane];
      const uint32_t code = word >> (j % kCodesPerWord * 4) & 15;
      const int64_t at = p.column + j;
      to[at / 2] = uint8_t(to[at / 2] | code << (at % 2 * 4));
    }
  }
}

// ---- round-to-nearest --------------------------------------------------------------------------

// A codebook in rising order; of equal values the first code.
struct Levels {
  int count;
  float value[16], middle[16];  // middle[i] between value[i] and value[i + 1]
  uint32_t code[16];
};

inline Levels levels_of(const float* table) {
  Levels levels{};
  for (uint32_t code = 0; code < 16; ++code) {
    int at = levels.count;
    bool known = false;
    for (int i = 0; i < levels.count; ++i) known = known || levels.value[i] == table[code];
    if (known) continue;
    for (; at && levels.value[at - 1] > table[code]; --at) {
      levels.value[at] = levels.value[at - 1];
      levels.code[at] = levels.code[at - 1];
    }
    levels.value[at] = table[code];
    levels.code[at] = code;
    ++levels.count;
  }
  for (int i = 0; i + 1 < levels.count; ++i)
    levels.middle[i] = (levels.value[i] + levels.value[i + 1]) * 0.5f;
  return levels;
}

FT_INLINE Vec nearest(const Levels& levels, Vec v) {
  Vec value = splat(levels.value[0]);
  for (int i = 0; i + 1 < levels.count; ++i)
    value = v > splat(levels.middle[i]) ? splat(levels.value[i + 1]) : value;
  return value;
}
FT_INLINE Words nearest_code(const Levels& levels, Vec v) {
  Words code = Words{} + levels.code[0];
  for (int i = 0; i + 1 < levels.count; ++i)
    code = v > splat(levels.middle[i]) ? Words{} + levels.code[i + 1] : code;
  return code;
}

// What a group's codes are made with.
struct Grid {
  Vec scale, zero;
};

// Sums |w - s q(w / s)|^2 over a group; `quantized` gives q.
template <class Quantized>
FT_INLINE Vec squared_error(const float* values, int64_t length, Vec scale,
                            const Quantized& quantized) {
  Vec total = zero();
  for (int64_t first = 0; first < length; first += kSumBlock) {
    Vec part = zero();
    for (int64_t j = first; j < lesser(length, first + kSumBlock); ++j) {
      const Vec v = load(values + j * kLanes);
      const Vec error = v - scale * quantized(v / scale);
      part = fma(error, error, part);
    }
    total = total + part;
  }
  return total;
}

FT_INLINE Vec integer_code(Vec units, Vec zero_point) {
  return clamped(rounded(units) + zero_point, 0.0f, 15.0f);
}

// The best of `grid` clipped ranges; the widest of equal ones.
FT_INLINE Grid search(const Quantize& f, const Levels& levels, const Range& r, const float* values,
                      int64_t length) {
  const Vec low = smaller(r.low, zero()), high = larger(r.high, zero());
  const Vec base = f.table       ? r.largest
                   : f.symmetric ? r.largest / splat(7.5f)
                                 : (high - low) / splat(15.0f);
  const Vec eight = splat(8.0f);
  Grid best{splat(1.0f), eight};
  Vec least = splat(kInfinity);
  for (int32_t i = 0; i < f.grid; ++i) {
    const Vec clip = splat(float(1.0 - 0.5 * i / f.grid));
    const Vec scale = stored_scale(base * clip, f.scale_dtype);
    Vec zero_point = eight, error;
    if (!f.table && !f.symmetric)
      zero_point = clamped(rounded(zero() - low * clip / scale), 0.0f, 15.0f);
    if (f.grid == 1)
      error = zero();
    else if (f.table)
      error = squared_error(values, length, scale, [&](Vec u) { return nearest(levels, u); });
    else
      error = squared_error(values, length, scale,
                            [&](Vec u) { return integer_code(u, zero_point) - zero_point; });
    if (!i) best = {scale, zero_point}, least = error;
    const auto better = error < least;
    least = better ? error : least;
    best.scale = better ? scale : best.scale;
    best.zero = better ? zero_point : best.zero;
  }
  const auto empty = r.largest == zero();
  best.scale = empty ? splat(1.0f) : best.scale;
  best.zero = empty ? eight : best.zero;
  return best;
}

// ---- half-quadratic ----------------------------------------------------------------------------

// A zero-point's loss, and the one that its codes suggest. In units of the scale: with u = w / s
// and e = u - (c - z) the loss is the sum of |e|^power, the sparse part of the error is W_e / s = e
// max(0, 1 - factor |e|^(power - 2)), and the next z is the mean of c - u + W_e / s.
struct Step {
  Vec loss, next;
};
FT_INLINE Step half_quadratic_step(const float* values, int64_t length, Vec z, Vec exponent,
                                   Vec factor) {
  Step step{zero(), zero()};
  for (int64_t first = 0; first < length; first += kSumBlock) {
    Vec loss = zero(), sum = zero();
    for (int64_t j = first; j < lesser(length, first + kSumBlock); ++j) {
      const Vec u = load(values + j * kLanes);
      const Vec code = clamped(rounded(u + z), 0.0f, 15.0f);
      const Vec error = u - (code - z);
      const Vec size = larger(magnitude(error), splat(1e-12f));
      const Vec power = exp2_of(exponent * log2_of(size));
      loss = fma(size * size, power, loss);
      const Vec kept = larger(splat(1.0f) - factor * power, zero());
      sum = sum + (code - u + error * kept);
    }
    step.loss = step.loss + loss;
    step.next = step.next + sum;
  }
  step.next = step.next / splat(float(length));
  return step;
}

// Keeps the z of the least loss; where it is to be an integer, the better one of the two around it.
// `values` becomes u.
FT_INLINE Grid half_quadratic(const Quantize& f, const Range& r, float* values, int64_t length) {
  const Vec low = f.round_zero ? smaller(r.low, zero()) : r.low;
  const Vec high = f.round_zero ? larger(r.high, zero()) : r.high;
  const Vec base = (high - low) / splat(15.0f);
  const Vec scale = base > zero() ? stored_scale(base, f.scale_dtype) : splat(1.0f);
  for (int64_t j = 0; j < length; ++j)
    store(values + j * kLanes, clamped(load(values + j * kLanes) / scale, -1e12f, 1e12f));
  const auto kept = [&](Vec z) { return f.round_zero ? z : stored(z, f.scale_dtype); };
  const Vec exponent = splat(f.power - 2.0f);
  const Vec strength = exp2_of(clamped(exponent * log2_of(scale), -120.0f, 120.0f));
  Vec z = kept(zero() - low / scale), best = z, least = splat(kInfinity);
  float beta = f.beta;
  for (int32_t i = 0; i <= f.iterations; ++i, beta *= f.kappa) {
    const Step step = half_quadratic_step(values, length, z, exponent, strength / splat(beta));
    const auto better = step.loss < least;
    least = better ? step.loss : least;
    best = better ? z : best;
    z = kept(step.next);
  }
  if (f.round_zero) {
    const Vec nearby = rounded(best);
    const Vec below = clamped(nearby > best ? nearby - splat(1.0f) : nearby, 0.0f, 15.0f);
    const Vec above = smaller(below + splat(1.0f), splat(15.0f));
    const Vec lower = half_quadratic_step(values, length, below, exponent, zero()).loss;
    const Vec upper = half_quadratic_step(values, length, above, exponent, zero()).loss;
    best = upper < lower ? above : below;
  }
  return {scale, best};
}

// ---- rows --------------------------------------------------------------------------------------

constexpr int64_t kWeightsPerTask = 1 << 16;

FT_INLINE void store_number(void* to, int64_t at, float value, int32_t dtype) {
  if (dtype == FT_BFLOAT16)
    static_cast<bf16*>(to)[at] = to_bf16(value);
  else
    static_cast<float*>(to)[at] = value;
}

struct Rows {
  int64_t first, count;  // the task's
  float* values;
  uint32_t* words;
};

// `make(values, length, codes)` fills a batch's codes and gives its scales and zero-points.
template <class Make>
void quantize_batches(const Quantize& f, const Rows& rows, int64_t column, int64_t length,
                      int64_t per_row, bool float_zero, const Make& make) {
  const int64_t pitch = (f.k + 1) / 2, groups = ceil_div(f.k, f.group_size);
  const int64_t total = rows.count * per_row;
  const void* weight = advanced(f.weight, f.dtype, rows.first * f.weight_stride_n);
  for (int64_t index = 0; index < total; index += kLanes) {
    const Batch b{index / per_row, per_row == 1 ? column : index % per_row * f.group_size,
                  length,          per_row,
                  f.group_size,    int(lesser(kLanes, total - index))};
    if (f.dtype == FT_FLOAT32)
      read_groups(b, static_cast<const float*>(weight), f.weight_stride_n, rows.values);
    else if (f.dtype == FT_BFLOAT16)
      read_groups(b, static_cast<const bf16*>(weight), f.weight_stride_n, rows.values);
    else
      read_groups(b, static_cast<const fp16*>(weight), f.weight_stride_n, rows.values);
    float scales[kLanes], zeros[kLanes];
    const Grid grid = make(rows.values, length, Codes{rows.words});
    store(scales, grid.scale);
    store(zeros, grid.zero);
    write_codes(b, rows.words, f.codes + rows.first * pitch, pitch);
    for (int lane = 0; lane < b.count; ++lane) {
      const Place p = place(b, lane);
      const int64_t at = (rows.first + p.row) * groups + p.column / f.group_size;
      store_number(f.scale, at, scales[lane], f.scale_dtype);
      if (!f.zero) continue;
      if (float_zero)
        store_number(f.zero, at, zeros[lane], f.scale_dtype);
      else
        static_cast<uint8_t*>(f.zero)[at] = uint8_t(zeros[lane]);
    }
  }
}

template <class Make>
void quantize(const Quantize& f, bool float_zero, const Make& make) {
  const ScratchScope scope;
  if (!f.n || !f.k) return;
  const int64_t length = lesser(f.group_size, f.k);
  const int64_t full = f.k / length, tail = f.k % length;
  // Enough rows to fill the lanes; no more than suit a task.
  const int64_t least = ceil_div(kLanes, full);
  const int64_t per_task = least * greater(1, kWeightsPerTask / (least * f.k));
  const int64_t tasks = ceil_div(f.n, per_task), pitch = (f.k + 1) / 2;
  const int64_t words = ceil_div(length, kCodesPerWord);
  const int64_t bytes = (length * kLanes * int64_t(sizeof(float)) +
                         words * kLanes * int64_t(sizeof(uint32_t)) + kCacheLine - 1) /
                        kCacheLine * kCacheLine;
  const int threads = f.n * f.k < kWeightsPerTask ? 1 : f.threads;
  char* const memory = static_cast<char*>(scratch(Scratch::kWorkers, threads * bytes));
  parallel_for(threads, tasks, [&](int64_t task, int worker) {
    char* const own = memory + worker * bytes;
    float* const values = reinterpret_cast<float*>(own);
    const Rows rows{task * per_task, lesser(per_task, f.n - task * per_task), values,
                    reinterpret_cast<uint32_t*>(values + length * kLanes)};
    memset(f.codes + rows.first * pitch, 0, size_t(rows.count * pitch));
    quantize_batches(f, rows, 0, length, full, float_zero, make);
    if (tail) quantize_batches(f, rows, full * length, tail, 1, float_zero, make);
  });
}

inline void rtn_quantize(const Quantize& f) {
  const Levels levels = f.table ? levels_of(f.table) : Levels{};
  quantize(f, false, [&](float* values, int64_t length, Codes codes) {
    const Range r = range_of(values, length);
    const Grid grid = search(f, levels, r, values, length);
    for (int64_t j = 0; j < length; ++j) {
      const Vec units = load(values + j * kLanes) / grid.scale;
      codes.put(j,
                f.table ? nearest_code(levels, units) : code_bits(integer_code(units, grid.zero)));
    }
    return Grid{grid.scale + r.poison, grid.zero};
  });
}

inline void hqq_quantize(const Quantize& f) {
  quantize(f, !f.round_zero, [&](float* values, int64_t length, Codes codes) {
    const Range r = range_of(values, length);
    const Grid grid = half_quadratic(f, r, values, length);
    for (int64_t j = 0; j < length; ++j) {
      const Vec units = load(values + j * kLanes);
      codes.put(j, code_bits(clamped(rounded(units + grid.zero), 0.0f, 15.0f)));
    }
    return Grid{grid.scale + r.poison, grid.zero};
  });
}

constexpr QuantizeKernels kQuantize{rtn_quantize, hqq_quantize};

}  // namespace
