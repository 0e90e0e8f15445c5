// Products of 4-bit weights with activations that are quantized on the way, for one level of the
// instruction set; see ops/ptq4.md. Codes are unpacked to bytes two strips of columns at a time, in
// the second-level cache, and meet all rows there.
#include "cpu/vec.inl.hpp"
// After the vocabulary:
#include "cpu/ptq4/int8_core.inl.hpp"

namespace {

// ---- activations ---------------------------------------------------------------------------

// The largest of the magnitudes' bits: that of a NaN where there is one.
inline int32_t largest_magnitude(const float* x, int64_t n) {
  Words most{};
  int64_t at = 0;
  for (; at + kLanes <= n; at += kLanes) {
    const Words bits = load_words(x + at) & kMagnitude;
    most = bits > most ? bits : most;
  }
  int32_t largest = 0;
  for (int lane = 0; lane < kLanes; ++lane) largest = int32_t(greater(largest, most[lane]));
  for (; at < n; ++at) largest = int32_t(greater(largest, int32_t(float_bits(x[at])) & kMagnitude));
  return largest;
}

// The bytes of a group, filled up to whole words with zeros, and the sum of what they stand for.
inline int32_t quantize(const float* x, int64_t n, const Range& range, uint8_t* bytes) {
  typedef uint8_t Codes __attribute__((vector_size(kLanes)));
  const Vec scale = splat(range.scale), low = splat(range.low), high = splat(range.high);
  Words sum{};
  for (int64_t at = 0; at < n; at += kLanes) {
    const int lanes = int(lesser(kLanes, n - at));
    const Words q = rounded(clamp(load(x + at, lanes) / scale, low, high));
    const Codes codes = __builtin_convertvector(q + range.zero, Codes);
    if (lanes == kLanes)
      memcpy(bytes + at, &codes, sizeof codes);
    else
      memcpy(bytes + at, &codes, size_t(lanes));
    sum += q;
  }
  for (int64_t at = n; at < ceil_div(n, kCodesOfWord) * kCodesOfWord; ++at)
    bytes[at] = uint8_t(range.zero);
  int32_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
  return total;
}

inline void quantize_row(const Int4Activations& f, int64_t m, const ByteRows& rows, float* x,
                         uint8_t* bytes) {
  load_row(f.x, m, x);
  const int64_t strip = m / rows.height;
  const int row = int(m % rows.height);
  for (int64_t g = 0; g < rows.depth.groups; ++g) {
    const float* const own = x + rows.depth.begin(g);
    const int64_t n = rows.depth.length(g);
    uint8_t* const to = bytes + rows.depth.words_before(g) * kCodesOfWord;
    const int32_t largest = largest_magnitude(own, n);
    Range range;
    float scale;
    if (f.range.scale) {
      range = range_of(f.range, g);
      scale = largest > kInfinity ? bits_float(kNan) : range.scale;
    } else {
      scale = largest < kInfinity ? bits_float(uint32_t(largest)) / 127.0f : bits_float(kNan);
      // Where all are zeros, or too small for a scale, so are the codes.
      range = {scale > 0 ? scale : 1.0f, 128, -127.0f, 127.0f};
    }
    const int32_t sum = quantize(own, n, range, to);
    rows.scales(strip)[g * rows.height + row] = scale;
    rows.sums(strip)[g * rows.height + row] = float(sum);
  }
  pack_byte_row(rows, strip, row, bytes);
}

// ---- weights -------------------------------------------------------------------------------

FT_INLINE float scalar_of(const void* data, int32_t dtype, int64_t at) {
  return dtype == FT_FLOAT32 ? static_cast<const float*>(data)[at]
                             : to_float(static_cast<const bf16*>(data)[at]);
}

// Strip `strip` of lines [n0, n0 + lines).
inline void unpack_strip(const Int4Weight& w, const ByteColumns& columns, int strip, int64_t n0,
                         int lines, const int32_t* offsets, Words* zeros, uint8_t* filled) {
  const ByteDepth& depth = columns.depth;
  float *const scales = columns.scales(strip), *const float_zeros = columns.zeros(strip);
  for (int64_t g = 0; g < depth.groups; ++g) {
    zeros[g] = splat_word(w.zero_kind == FT_ZERO_NONE ? 0x08080808 : 0);
    store(scales + g * kLanes, zero());
    store(float_zeros + g * kLanes, zero());
  }
  for (int lane = 0; lane < lines; ++lane)
    for (int64_t g = 0; g < depth.groups; ++g) {
      const int64_t at = (n0 + lane) * w.groups + g, to = g * kLanes + lane;
      scales[to] = scalar_of(w.scale, w.scale_dtype, at);
      if (w.zero_kind == FT_ZERO_UINT8)
        zeros[g][lane] = static_cast<const uint8_t*>(w.zero)[at] * 0x01010101;
      else if (w.zero_kind == FT_ZERO_FLOAT)
        float_zeros[to] = scalar_of(w.zero, w.scale_dtype, at);
    }
  const int64_t row_bytes = w.row_bytes;
  const uint8_t* codes = w.codes + n0 * row_bytes;
  int64_t stride = row_bytes;
  if (w.group % kCodesOfWord) {
    stride = depth.words() * 4;
    for (int line = 0; line < lines; ++line)
      fill_up_groups(codes + line * row_bytes, depth, filled + line * stride);
    codes = filled;
  }
  pack_byte_columns(columns, strip, codes, stride, lines, zeros, offsets);
}

// ---- the product ---------------------------------------------------------------------------

template <class T>
void store_tile(const Int4Activations& f, const float* tile, int64_t m, int64_t n, int rows) {
  const T* const bias = static_cast<const T*>(f.bias);
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < kByteColumns; j += kLanes) {
      const int lanes = int(lesser(kLanes, f.weight.n - n - j));
      if (lanes <= 0) break;
      Vec v = load(tile + i * kByteColumns + j);
      if (bias) v = add(v, load(bias + n + j, lanes));
      store(static_cast<T*>(f.y) + (m + i) * f.weight.n + n + j, v, lanes);
    }
}

inline int64_t whole_lines(int64_t bytes) { return ceil_div(bytes, kCacheLine) * kCacheLine; }

inline void int4_linear(const Int4Activations& f) {
  const ScratchScope scope;
  const Int4Weight& w = f.weight;
  if (!f.x.m || !w.n) return;
  const ByteDepth depth{w.k, w.group, w.groups};
  const int height = byte_row_height(f.x.m);
  const int64_t row_strips = ceil_div(f.x.m, height), column_pairs = ceil_div(w.n, kByteColumns);

  ByteRows rows{nullptr, height, depth};
  const int64_t rows_bytes = whole_lines(row_strips * rows.strip_words() * 4);
  const int64_t offsets_bytes = whole_lines(depth.groups * 4 + 4);
  char* const shared = static_cast<char*>(scratch(Scratch::kRowPanels, rows_bytes + offsets_bytes));
  rows.data = reinterpret_cast<uint32_t*>(shared);
  int32_t* const offsets = reinterpret_cast<int32_t*>(shared + rows_bytes);
  for (int64_t g = 0; g < depth.groups; ++g)
    offsets[g] = f.range.scale ? range_of(f.range, g).zero : 128;

  // What a worker needs: a row as floats and as bytes; a panel, zeros, filled-up codes and a tile.
  const int64_t floats_bytes = whole_lines(w.k * 4 + 4);
  const int64_t bytes_bytes = whole_lines(depth.words() * kCodesOfWord + kCodesOfWord);
  const int64_t panel_bytes = whole_lines(ByteColumns::words(depth) * 4 + 4);
  const int64_t zeros_bytes = whole_lines(depth.groups * int64_t(sizeof(Words)) + 4);
  const int64_t filled_bytes = whole_lines(depth.words() * 4 * kLanes + 4);
  const int64_t tile_bytes = int64_t(kByteRows) * kByteColumns * 4;
  const int64_t worker_bytes =
      greater(floats_bytes + bytes_bytes, panel_bytes + zeros_bytes + filled_bytes + tile_bytes);
  const int threads = f.x.m * w.n * w.k < (int64_t(1) << 18) ? 1 : f.threads;
  char* const workers = static_cast<char*>(scratch(Scratch::kWorkers, threads * worker_bytes));

  parallel_for(threads, row_strips, [&](int64_t strip, int worker) {
    char* const own = workers + worker * worker_bytes;
    // What completes the last strip is multiplied too, and not stored.
    for (int64_t m = strip * height; m < lesser((strip + 1) * height, f.x.m); ++m)
      quantize_row(f, m, rows, reinterpret_cast<float*>(own),
                   reinterpret_cast<uint8_t*>(own + floats_bytes));
  });

  const ByteTile multiply = w.zero_kind == FT_ZERO_FLOAT ? byte_tile_of_height<true>(height)
                                                         : byte_tile_of_height<false>(height);
  const auto store_rows = f.x.dtype == FT_FLOAT32    ? store_tile<float>
                          : f.x.dtype == FT_BFLOAT16 ? store_tile<bf16>
                                                     : store_tile<fp16>;
  // Few columns: their rows are shared out too.
  const int64_t row_parts =
      lesser(row_strips, threads > 1 ? ceil_div(4 * threads, column_pairs) : 1);
  parallel_for(threads, column_pairs * row_parts, [&](int64_t task, int worker) {
    char* const own = workers + worker * worker_bytes;
    const ByteColumns columns{reinterpret_cast<uint32_t*>(own), depth};
    Words* const zeros = reinterpret_cast<Words*>(own + panel_bytes);
    uint8_t* const filled = reinterpret_cast<uint8_t*>(own + panel_bytes + zeros_bytes);
    float* const tile = reinterpret_cast<float*>(own + panel_bytes + zeros_bytes + filled_bytes);
    const int64_t n0 = task / row_parts * kByteColumns, part = task % row_parts;
    for (int strip = 0; strip < kByteStrips; ++strip) {
      const int64_t n = n0 + strip * kLanes;
      const int lines = int(greater(0, lesser(kLanes, w.n - n)));
      unpack_strip(w, columns, strip, lines ? n : 0, lines, offsets, zeros, filled);
    }
    const int64_t s1 = (part + 1) * row_strips / row_parts;
    for (int64_t s = part * row_strips / row_parts; s < s1; ++s) {
      multiply(rows, s, columns, tile);
      store_rows(f, tile, s * height, n0, int(lesser(height, f.x.m - s * height)));
    }
  });
}

constexpr Int4ActivationKernels kInt4Activations{int4_linear};

}  // namespace
