// Dropout masks as bits: bit i % 8 of byte i / 8 says whether element i is kept. A byte is one call
// of Philox, so that a mask is written once per call of a kernel, an eighth of a byte per element,
// and every pass over the elements reads it at any alignment.
namespace {

// At least 32 bits of the mask, that of `element` the lowest.
FT_INLINE uint32_t keep_bits(const uint8_t* mask, int64_t element) {
  uint64_t bits;
  memcpy(&bits, mask + element / 8, sizeof bits);
  return uint32_t(bits >> element % 8);
}

// What does not change from group to group.
struct MaskSource {
  Wide keys[10][2], multipliers[2], offset, offset_high, threshold;
};

FT_INLINE MaskSource mask_source(const Dropout& d) {
  MaskSource source;
  uint32_t k0 = uint32_t(d.seed), k1 = uint32_t(d.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    source.keys[round][0] = Wide{} + k0;
    source.keys[round][1] = Wide{} + k1;
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  source.multipliers[0] = Wide{} + kPhiloxMultiplier0;
  source.multipliers[1] = Wide{} + kPhiloxMultiplier1;
  source.offset = Wide{} + d.offset;
  source.offset_high = source.offset >> 32;
  source.threshold = Wide{} + d.threshold;
  return source;
}

// The bytes of groups counter[0], counter[1], ...
FT_INLINE void draw_mask(const MaskSource& source, Wide counter, uint8_t* mask) {
  // Only the low half of a lane counts; mul_low and the draws ignore the other.
  Wide c0 = counter, c1 = counter >> 32, c2 = source.offset, c3 = source.offset_high;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Wide low = mul_low(c0, source.multipliers[0]), high = mul_low(c2, source.multipliers[1]);
    c0 = high >> 32 ^ c1 ^ source.keys[round][0];
    c1 = high;
    c2 = low >> 32 ^ c3 ^ source.keys[round][1];
    c3 = low;
  }
  const Wide words[4] = {c0, c1, c2, c3};
  Wide bytes{};
#pragma GCC unroll 8
  for (int half = 0; half < kDropoutGroup; ++half) {
    const Wide draw = words[half / 2] >> half % 2 * 16 & 0xffffu;
    bytes |= reinterpret_cast<Wide>(draw >= source.threshold) & uint64_t(1) << half;
  }
  for (int lane = 0; lane < kWideLanes; ++lane) mask[lane] = uint8_t(bytes[lane]);
}

// The mask of elements [0, elements) into mask_bytes(elements) bytes.
inline void write_mask(const Dropout& d, int64_t elements, uint8_t* mask, int threads) {
  constexpr int64_t kTask = 2048;  // bytes: about 10 microseconds
  const int64_t bytes = ceil_div(elements, 64) * 8;
  parallel_for(threads, ceil_div(bytes, kTask), [=](int64_t task, int) {
    const int64_t end = lesser(bytes, (task + 1) * kTask);
    const MaskSource source = mask_source(d);
    Wide counter;
    for (int lane = 0; lane < kWideLanes; ++lane) counter[lane] = uint64_t(task * kTask + lane);
    for (int64_t group = task * kTask; group < end; group += kWideLanes, counter += kWideLanes)
      draw_mask(source, counter, mask + group);
  });
}

}  // namespace
