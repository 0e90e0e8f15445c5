// What the 4-bit codes 0..15 stand for, shared by host and device; pyfastft/_codebook.py is the
// same in Python, and a test holds the two together. Source: Dettmers et al. 2023, "QLoRA",
// appendix E, with the values that bitsandbytes computes.
#pragma once
#include <cstdint>

// Mirrored by CODEBOOKS in pyfastft/_codebook.py.
enum ft_codebook : int32_t { FT_INT4 = 0, FT_NF4 = 1, FT_FP4 = 2 };
// What a zero-point is: none (8 with FT_INT4), uint8, or of the scale's dtype.
enum ft_zero : int32_t { FT_ZERO_NONE = 0, FT_ZERO_UINT8 = 1, FT_ZERO_FLOAT = 2 };

namespace fastft {

constexpr int kCodes = 16;
constexpr float kImpliedZero = 8.0f;

constexpr float kCodebooks[3][kCodes] = {
    {0.0f, 1.0f, 2.0f, 3.0f, 4.0f, 5.0f, 6.0f, 7.0f, 8.0f, 9.0f, 10.0f, 11.0f, 12.0f, 13.0f, 14.0f,
     15.0f},
    {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
     -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
     0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
     0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f},
    {0.0f, 0.0625f / 12, 8.0f / 12, 1.0f, 4.0f / 12, 0.5f, 2.0f / 12, 0.25f, 0.0f, -0.0625f / 12,
     -8.0f / 12, -1.0f, -4.0f / 12, -0.5f, -2.0f / 12, -0.25f},
};

}  // namespace fastft
