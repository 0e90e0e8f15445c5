// Stochastic rounding, shared by host and device: up with the probability of the fraction lost, so
// that its expectation is the value. 16 random bits decide. Infinite and NaN stay as they are.
#pragma once
#include <cstdint>

#include "fastft/dtype.h"

namespace fastft {

template <class T>
FT_HOST_DEVICE T round_stochastic(float x, uint32_t random);

template <>
FT_HOST_DEVICE float round_stochastic<float>(float x, uint32_t) {
  return x;
}

template <>
FT_HOST_DEVICE bf16 round_stochastic<bf16>(float x, uint32_t random) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7f800000u) == 0x7f800000u) return to_bf16(x);
  return bf16{uint16_t((u + random) >> 16)};
}

template <>
FT_HOST_DEVICE fp16 round_stochastic<fp16>(float x, uint32_t random) {
  const uint32_t u = float_bits(x), a = u & 0x7fffffffu;
  if (a >= 0x47800000u) return to_fp16(x);  // 65536 and above
  if (a >= 0x38800000u)                     // 2^-14: normal
    return to_fp16(bits_float((u + (random >> 3)) & ~0x1fffu));
  const float units = bits_float(a) * 16777216.0f;  // of 2^-24, exactly
  uint32_t whole = uint32_t(units);
  if ((units - float(whole)) * 65536.0f > float(random)) ++whole;
  return fp16{uint16_t(((u >> 16) & 0x8000u) | whole)};
}

}  // namespace fastft
