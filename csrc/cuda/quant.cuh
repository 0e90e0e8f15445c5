// 4-bit weights as every kernel of the ptq4 family reads them: W[n, k] = scale * (code - zero), or
// scale * table[code]. Index maths and unpacking are plain C++, so that the tests run them on the
// host too.
#pragma once
#include <cstdint>

#include "fastft/codebook.h"
#include "fastft/dtype.h"

namespace fastft {

// A matrix of 4-bit codes (n, k) and what they mean. A row has ceil(k / 2) bytes, an even k in the
// low half of its byte, and `groups` scales. Pointers are the device's.
struct QuantizedMatrix {
  const uint8_t* codes;
  const void* scale;   // (n, groups), float or bf16 or fp16
  const void* zero;    // (n, groups)
  const float* table;  // 16 numbers, or null: the codes are integers
  int64_t n, k, groups, group_size;
  int32_t scale_dtype, zero_kind;
};

FT_HOST_DEVICE int64_t code_bytes(int64_t k) { return (k + 1) / 2; }

FT_HOST_DEVICE float load_number(const void* data, int32_t dtype, int64_t index) {
  if (dtype == FT_FLOAT32) return static_cast<const float*>(data)[index];
  if (dtype == FT_BFLOAT16) return to_float(static_cast<const bf16*>(data)[index]);
  return to_float(static_cast<const fp16*>(data)[index]);
}

FT_HOST_DEVICE float scale_of(const QuantizedMatrix& w, int64_t row, int64_t group) {
  return load_number(w.scale, w.scale_dtype, row * w.groups + group);
}

// What is subtracted from a row's code before it is scaled.
FT_HOST_DEVICE float zero_of(const QuantizedMatrix& w, int64_t row, int64_t group) {
  if (w.table) return 0.0f;
  if (w.zero_kind == FT_ZERO_NONE) return kImpliedZero;
  const int64_t place = row * w.groups + group;
  if (w.zero_kind == FT_ZERO_UINT8) return float(static_cast<const uint8_t*>(w.zero)[place]);
  return load_number(w.zero, w.scale_dtype, place);
}

// Integers 0..15 as floats: 2^23 + code has the code in its last bits, and subtracting is exact.
constexpr float kFloatBias = 8388608.0f;
FT_HOST_DEVICE float biased_float(uint32_t code) { return bits_float(0x4b000000u | code); }
FT_HOST_DEVICE float code_float(uint32_t code) { return biased_float(code) - kFloatBias; }

// ---- pairs of codes as pairs of half precision
// --------------------------------------------------- 128 + c is 0x4300 | c in bf16, 1024 + c is
// 0x6400 | c in fp16.

template <class T>
struct HalfCodes;
template <>
struct HalfCodes<bf16> {
  static constexpr uint32_t kBias = 0x43004300u, kOne = 0x3f803f80u;
  static constexpr uint32_t kMinusBias = 0xc300c300u;
  static constexpr uint32_t kMinusBiasAndZero = 0xc308c308u;  // -(128 + 8), twice
};
template <>
struct HalfCodes<fp16> {
  static constexpr uint32_t kBias = 0x64006400u, kOne = 0x3c003c00u;
  static constexpr uint32_t kMinusBias = 0xe400e400u;
  static constexpr uint32_t kMinusBiasAndZero = 0xe408e408u;  // -(1024 + 8), twice
};

// Codes i and i + 4 of the eight in a word, biased: the low half is code i.
template <class T>
FT_HOST_DEVICE uint32_t biased_pair(uint32_t word, int i) {
  return (word >> 4 * i & 0x000f000fu) | HalfCodes<T>::kBias;
}

// Two halves side by side, and the first or the second halves of two words.
FT_HOST_DEVICE uint32_t pack_halves(uint16_t low, uint16_t high) {
  return uint32_t(high) << 16 | low;
}
FT_HOST_DEVICE uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xffffu) | b << 16; }
FT_HOST_DEVICE uint32_t high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }

}  // namespace fastft
