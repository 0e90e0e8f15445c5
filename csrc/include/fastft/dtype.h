// Element types: their codes on the ABI, and exact conversions shared by host and device.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FT_HOST_DEVICE inline
#endif

// Mirrored by DTYPES in pyfastft/_native.py; a test holds the two together.
enum ft_dtype : int32_t { FT_FLOAT32 = 0, FT_BFLOAT16 = 1, FT_FLOAT16 = 2 };

namespace fastft {

inline int64_t element_bytes(int32_t dtype) { return dtype == FT_FLOAT32 ? 4 : 2; }

// The address so many elements on; null stays null.
inline const void* advanced(const void* data, int32_t dtype, int64_t elements) {
  return data ? static_cast<const char*>(data) + elements * element_bytes(dtype) : nullptr;
}
inline void* advanced(void* data, int32_t dtype, int64_t elements) {
  return data ? static_cast<char*>(data) + elements * element_bytes(dtype) : nullptr;
}

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

FT_HOST_DEVICE uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}
FT_HOST_DEVICE float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

FT_HOST_DEVICE float to_float(float x) { return x; }
FT_HOST_DEVICE float to_float(bf16 x) { return bits_float(uint32_t(x.bits) << 16); }

// Subnormals included: scaling by a power of two is exact.
FT_HOST_DEVICE float to_float(fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  if ((x.bits & 0x7c00u) == 0x7c00u) return bits_float(sign | 0x7f800000u | magnitude);
  const float value = bits_float(magnitude) * bits_float(0x77800000u);  // 2^112
  return bits_float(sign | float_bits(value));
}

// Round to nearest, ties to even; a NaN stays a NaN.
FT_HOST_DEVICE bf16 to_bf16(float x) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{uint16_t((u >> 16) | 0x40u)};
  return bf16{uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

FT_HOST_DEVICE fp16 to_fp16(float x) {
  const uint32_t u = float_bits(x);
  const uint16_t sign = uint16_t((u >> 16) & 0x8000u);
  const uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return fp16{uint16_t(sign | 0x7e00u | ((a >> 13) & 0x3ffu))};
  if (a >= 0x477ff000u) return fp16{uint16_t(sign | 0x7c00u)};  // 65520 and above round to inf
  if (a < 0x38800000u) {  // below 2^-14: adding 0.5 rounds to the subnormal grid of 2^-24
    const float rounded = bits_float(a) + 0.5f;
    return fp16{uint16_t(sign | (float_bits(rounded) - 0x3f000000u))};
  }
  return fp16{uint16_t(sign | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13))};
}

template <class T>
FT_HOST_DEVICE T from_float(float x);
template <>
FT_HOST_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
FT_HOST_DEVICE bf16 from_float<bf16>(float x) {
  return to_bf16(x);
}
template <>
FT_HOST_DEVICE fp16 from_float<fp16>(float x) {
  return to_fp16(x);
}

}  // namespace fastft
