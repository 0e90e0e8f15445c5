// Philox4x32-10 and the dropout mask made of it, shared by host and device. What a mask is, is
// specified in pyfastft/_random.py; no backend may differ from it by a bit.
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.
#pragma once
#include <cstdint>

#include "fastft/dtype.h"

namespace fastft {

struct Philox4 {
  uint32_t word[4];
};

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kDropoutGroup = 8;  // elements that share one call: 16 bits each

// What one dropout needs: the key and the high half of the counter, the threshold of 65536, and
// the scale of what is kept.
struct Dropout {
  uint64_t seed, offset;
  uint32_t threshold;  // 0: nothing is dropped
  float scale;
};

// Bytes of a mask of so many elements, a bit for each, that is read 8 bytes at a time.
FT_HOST_DEVICE int64_t mask_bytes(int64_t elements) { return (elements + 63) / 64 * 8 + 8; }

FT_HOST_DEVICE Dropout make_dropout(const int64_t* rng, uint32_t threshold) {
  Dropout d{0, 0, rng ? threshold : 0u, 1.0f};
  if (d.threshold) {
    d.seed = uint64_t(rng[0]);
    d.offset = uint64_t(rng[1]);
    d.scale = d.threshold < 65536u ? 65536.0f / float(65536u - d.threshold) : 0.0f;
  }
  return d;
}

FT_HOST_DEVICE Philox4 philox4x32(uint64_t seed, uint64_t counter, uint64_t offset) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  uint32_t c0 = uint32_t(counter), c1 = uint32_t(counter >> 32);
  uint32_t c2 = uint32_t(offset), c3 = uint32_t(offset >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t low = uint64_t(kPhiloxMultiplier0) * c0;
    const uint64_t high = uint64_t(kPhiloxMultiplier1) * c2;
    c0 = uint32_t(high >> 32) ^ c1 ^ k0;
    c1 = uint32_t(high);
    c2 = uint32_t(low >> 32) ^ c3 ^ k1;
    c3 = uint32_t(low);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// Draw `half` (0..7) of a group's words: 16 bits, the low half of each word first.
FT_HOST_DEVICE uint32_t philox_half(const Philox4& words, int half) {
  return (words.word[half >> 1] >> ((half & 1) * 16)) & 0xffffu;
}

FT_HOST_DEVICE bool dropout_keeps(const Dropout& d, int64_t element) {
  const Philox4 words = philox4x32(d.seed, uint64_t(element) / kDropoutGroup, d.offset);
  return philox_half(words, int(element % kDropoutGroup)) >= d.threshold;
}

}  // namespace fastft
