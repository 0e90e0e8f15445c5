// Selection of the k best entries of several tensors, for one level of the instruction set; exact,
// ties by position, and no score is ever written.
//
// A score becomes a 32-bit key of the same order. A sample brackets the k-th key; one pass over the
// tensors counts the keys above the bracket and makes a histogram of those within; the bin of the
// k-th key is the next bracket, until a bin is one key wide. Usually the first pass settles it. A
// bracket that the k-th key is not in only costs a pass. A last pass collects the positions above
// the key, and the first of those equal to it: traffic is two readings of the tensors.
#include "cpu/vec.inl.hpp"

namespace {

constexpr int64_t kSampledRuns = 8192, kSampledRun = 16, kRunsAhead = 16;
constexpr int64_t kUnsampled = int64_t(1) << 19;  // so few elements are not worth a sample
constexpr int kMostBins = 1 << 20, kCoarseBins = 1 << 16;
constexpr int64_t kBinsOfRange = kMostBins + kCacheLine;

typedef uint32_t Keys __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef int32_t Signs __attribute__((vector_size(kLanes * sizeof(int32_t))));

// Lanes whose key is at least `least`, as bits.
FT_INLINE uint32_t at_least(Keys keys, uint32_t least) {
#if FT_LANES == 16
  return _mm512_cmpge_epu32_mask(reinterpret_cast<__m512i>(keys), _mm512_set1_epi32(int(least)));
#elif FT_LANES == 8
  const __m256i k = reinterpret_cast<__m256i>(keys);
  const __m256i greatest = _mm256_max_epu32(k, _mm256_set1_epi32(int(least)));
  return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(greatest, k))));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= uint32_t(keys[lane] >= least) << lane;
  return bits;
#endif
}

// The order of scores: NaN, the least of all, is 0; zeros of both signs are one.
FT_INLINE Keys key_of(Vec score) {
  const Keys u = reinterpret_cast<Keys>(add(score, zero()));
  const Keys negative = reinterpret_cast<Keys>(reinterpret_cast<Signs>(u) >> 31);
  const Keys key = u ^ (negative | 0x80000000u);
  return key & reinterpret_cast<Keys>(score == score);
}

FT_INLINE Vec magnitude(Vec v) {
  return reinterpret_cast<Vec>(reinterpret_cast<Keys>(v) & 0x7fffffffu);
}
FT_INLINE Vec minus(Vec v) {
  return reinterpret_cast<Vec>(reinterpret_cast<Keys>(v) ^ 0x80000000u);
}

template <Score kScore>
FT_INLINE Vec score_of(Vec a, Vec b) {
  switch (kScore) {
    case Score::kMagnitude:
      return magnitude(a);
    case Score::kSquare:
      return mul(a, a);
    case Score::kProduct:
      return magnitude(mul(a, b));
    case Score::kMovement:
      return minus(mul(a, b));
    case Score::kDifference:
      return magnitude(a - b);
    case Score::kScaled:
      return mul(magnitude(a), b);
    default:
      return a;
  }
}

// n <= kLanes keys of a tensor from element `at` on. Nothing is known of the lanes beyond.
template <class T, Score kScore>
FT_INLINE Keys keys_at(const Selection& f, const Scored& s, int64_t at, int n) {
  if constexpr (kScore == Score::kRandom) {
    Keys drawn{};
    Philox4 words{};
    for (int lane = 0; lane < n; ++lane) {
      const uint64_t position = uint64_t(s.first + at + lane);
      if (!lane || position % 4 == 0)
        words = philox4x32(uint64_t(f.rng[0]), position / 4, uint64_t(f.rng[1]));
      drawn[lane] = words.word[position % 4];
    }
    return f.largest ? drawn : ~drawn;
  } else {
    Vec other = zero();
    if constexpr (kScore == Score::kProduct || kScore == Score::kMovement ||
                  kScore == Score::kDifference)
      other = load(static_cast<const T*>(s.b) + at, n);
    if constexpr (kScore == Score::kScaled)
      other = load(static_cast<const float*>(s.b) + at % s.columns, n);
    const Vec score = score_of<kScore>(load(static_cast<const T*>(s.a) + at, n), other);
    return key_of(f.largest ? score : minus(score));
  }
}

// The keys that passed, and their elements from the block's first on.
constexpr int64_t kKeyBlock = 2048;
struct Passed {
  uint32_t keys[kKeyBlock + kLanes], elements[kKeyBlock + kLanes];
};

// Appends lanes behind `count` and returns how many there are then; without a branch for each lane,
// because which pass cannot be foreseen.
FT_INLINE int append(Passed& to, int count, Keys own, uint32_t lanes, uint32_t element) {
#if FT_LANES == 16
  const __m512i numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i at = _mm512_add_epi32(numbers, _mm512_set1_epi32(int(element)));
  const __m512i key = reinterpret_cast<__m512i>(own);
  _mm512_storeu_si512(to.keys + count, _mm512_maskz_compress_epi32(__mmask16(lanes), key));
  _mm512_storeu_si512(to.elements + count, _mm512_maskz_compress_epi32(__mmask16(lanes), at));
  return count + __builtin_popcount(lanes);
#else
  for (; lanes; lanes &= lanes - 1) {
    const int lane = __builtin_ctz(lanes);
    to.keys[count] = own[lane];
    to.elements[count++] = element + uint32_t(lane);
  }
  return count;
#endif
}

// The keys of elements [begin, end), at most kKeyBlock, that are at least `least`; their number.
template <class T, Score kScore>
FT_INLINE int pass_keys(const Selection& f, const Scored& s, int64_t begin, int64_t end,
                        uint32_t least, Passed& to) {
  int count = 0;
  for (int64_t at = begin; at < end;) {
    int n = int(lesser(kLanes, end - at));
    if constexpr (kScore == Score::kScaled) n = int(lesser(n, s.columns - at % s.columns));
    const Keys keys =
        n == kLanes ? keys_at<T, kScore>(f, s, at, kLanes) : keys_at<T, kScore>(f, s, at, n);
    const uint32_t lanes = at_least(keys, least) & uint32_t((uint64_t(1) << n) - 1);
    count = append(to, count, keys, lanes, uint32_t(at - begin));
    at += n;
  }
  return count;
}

// Walks through the excluded offsets of a tensor as positions ascend.
struct Excluded {
  const Scored& s;
  int64_t next;

  Excluded(const Scored& tensor, int64_t begin) : s(tensor), next(0) {
    int64_t high = s.excluded;
    while (next < high) {
      const int64_t middle = (next + high) / 2;
      if (offset(middle) < begin)
        next = middle + 1;
      else
        high = middle;
    }
  }
  int64_t offset(int64_t i) const {
    return s.exclude_bytes == 4 ? static_cast<const int32_t*>(s.exclude)[i]
                                : static_cast<const int64_t*>(s.exclude)[i];
  }
  bool holds(int64_t at) {
    while (next < s.excluded && offset(next) < at) ++next;
    return next < s.excluded && offset(next) == at;
  }
};

// Keys in [low, low + (bins << shift)) by bin, and in one bin more those above.
struct Histogram {
  uint64_t low;
  int shift, bins;

  uint64_t high() const { return low + (uint64_t(bins) << shift); }
};

template <class T, Score kScore>
void count_keys(const Selection& f, const Scored& s, int64_t begin, int64_t end, const Histogram& h,
                uint32_t* counts) {
  Excluded excluded(s, begin);
  Passed passed;
  const uint32_t low = uint32_t(h.low), last = uint32_t(h.bins);
  for (; begin < end; begin += kKeyBlock) {
    const int64_t block_end = lesser(end, begin + kKeyBlock);
    const int count = pass_keys<T, kScore>(f, s, begin, block_end, low, passed);
    for (int i = 0; i < count; ++i) {
      if (s.excluded && excluded.holds(begin + passed.elements[i])) continue;
      const uint32_t bin = (passed.keys[i] - low) >> h.shift;
      ++counts[bin < last ? bin : last];
    }
  }
}

// The positions of keys above `key`, and of at most `most` equal to it, which are marked:
// ~position.
struct Collected {
  int64_t* positions;
  int64_t count, equal;
};

template <class T, Score kScore>
void collect_keys(const Selection& f, const Scored& s, int64_t begin, int64_t end, uint32_t key,
                  int64_t most, Collected* to) {
  Excluded excluded(s, begin);
  Passed passed;
  for (; begin < end; begin += kKeyBlock) {
    const int64_t block_end = lesser(end, begin + kKeyBlock);
    const int count = pass_keys<T, kScore>(f, s, begin, block_end, key, passed);
    for (int i = 0; i < count; ++i) {
      const int64_t element = begin + passed.elements[i];
      if (s.excluded && excluded.holds(element)) continue;
      const bool equal = passed.keys[i] == key;
      if (equal && to->equal++ >= most) continue;
      to->positions[to->count++] = equal ? ~(s.first + element) : s.first + element;
    }
  }
}

struct KeyLoops {
  void (*count)(const Selection&, const Scored&, int64_t, int64_t, const Histogram&, uint32_t*);
  void (*collect)(const Selection&, const Scored&, int64_t, int64_t, uint32_t, int64_t, Collected*);
};

template <class T>
KeyLoops loops_of(Score score) {
  switch (score) {
    case Score::kMagnitude:
      return {count_keys<T, Score::kMagnitude>, collect_keys<T, Score::kMagnitude>};
    case Score::kSquare:
      return {count_keys<T, Score::kSquare>, collect_keys<T, Score::kSquare>};
    case Score::kProduct:
      return {count_keys<T, Score::kProduct>, collect_keys<T, Score::kProduct>};
    case Score::kMovement:
      return {count_keys<T, Score::kMovement>, collect_keys<T, Score::kMovement>};
    case Score::kDifference:
      return {count_keys<T, Score::kDifference>, collect_keys<T, Score::kDifference>};
    case Score::kScaled:
      return {count_keys<T, Score::kScaled>, collect_keys<T, Score::kScaled>};
    default:
      return {count_keys<T, Score::kValue>, collect_keys<T, Score::kValue>};
  }
}

inline KeyLoops choose_loops(Score score, int32_t dtype) {
  if (score == Score::kRandom)
    return {count_keys<float, Score::kRandom>, collect_keys<float, Score::kRandom>};
  if (dtype == FT_FLOAT32) return loops_of<float>(score);
  return dtype == FT_BFLOAT16 ? loops_of<bf16>(score) : loops_of<fp16>(score);
}

// body(tensor, first element, end) for the elements of all tensors in positions [begin, end).
template <class Body>
void for_each_part(const Selection& f, int64_t begin, int64_t end, const Body& body) {
  for (const Scored* s = f.tensors; s < f.tensors + f.count; ++s) {
    const int64_t from = greater(0, begin - s->first), to = lesser(s->size, end - s->first);
    if (from < to) body(*s, from, to);
  }
}

// How all positions are cut, and what each range needs; the same bits whatever the cut.
struct Ranges {
  int64_t count, length;

  explicit Ranges(const Selection& f) {
    // A range's counts have 32 bits.
    count = greater(f.size < kUnsampled / 8 ? 1 : f.threads, ceil_div(f.size, int64_t(1) << 31));
    length = ceil_div(ceil_div(f.size, count), 64) * 64;
  }
};

// A bracket that holds the k-th key very probably: from the keys of a sample by their high halves.
inline Histogram sampled_bracket(const Selection& f, uint32_t* counts) {
  memset(counts, 0, (kCoarseBins + 1) * sizeof(uint32_t));
  const Histogram coarse{0, 16, kCoarseBins};
  int64_t sampled = 0;
  const int64_t step = f.size / kSampledRuns;
  for (int64_t run = 0; run < kSampledRuns; ++run) {
    const int64_t begin = run * step;
    for_each_part(f, begin, lesser(f.size, begin + kSampledRun),
                  [&](const Scored& s, int64_t from, int64_t to) {
                    const void* next = advanced(s.a, s.dtype, from + kRunsAhead * step);
                    __builtin_prefetch(next);  // of the same tensor, mostly
                    choose_loops(f.score, s.dtype).count(f, s, from, to, coarse, counts);
                    sampled += to - from;
                  });
  }
  // Six deviations of independent draws. Neighbours are alike, so it may miss; see find_threshold.
  const double rank = double(f.k) / double(f.size) * double(sampled);
  const double margin = 6.0 * __builtin_sqrt(rank * (1.0 - rank / double(sampled))) + 32.0;
  int64_t bin = kCoarseBins, above = 0;
  while (bin > 0 && double(above + counts[bin - 1]) < rank - margin) above += counts[--bin];
  const int64_t high = bin;
  while (bin > 0 && double(above) < rank + margin) above += counts[--bin];
  const uint64_t low = uint64_t(bin) << 16, width = uint64_t(high - bin) << 16;
  int shift = 0;
  while (width >> shift > uint64_t(kMostBins)) ++shift;
  return {low, shift, int(width >> shift)};
}

// The k-th key, and how many are above it.
struct Threshold {
  uint32_t key;
  int64_t above;
};

inline Threshold find_threshold(const Selection& f, const Ranges& ranges, uint32_t* counts) {
  Histogram h{0, 16, kCoarseBins};
  if (f.size >= kUnsampled) h = sampled_bracket(f, counts);
  for (;;) {
    parallel_for(f.threads, ranges.count, [&](int64_t range, int) {
      uint32_t* const own = counts + range * kBinsOfRange;
      memset(own, 0, size_t(h.bins + 1) * sizeof(uint32_t));
      for_each_part(f, range * ranges.length, (range + 1) * ranges.length,
                    [&](const Scored& s, int64_t from, int64_t to) {
                      choose_loops(f.score, s.dtype).count(f, s, from, to, h, own);
                    });
    });
    int64_t total = 0;
    for (int64_t range = 0; range < ranges.count; ++range)
      total += counts[range * kBinsOfRange + h.bins];
    if (total >= f.k) {  // all of them are above the bracket
      const uint64_t low = h.high();
      int shift = 0;
      while ((0x100000000u - low + (uint64_t(1) << shift) - 1) >> shift > uint64_t(kMostBins))
        ++shift;
      h = {low, shift, int((0x100000000u - low + (uint64_t(1) << shift) - 1) >> shift)};
      continue;
    }
    int bin = h.bins;
    int64_t within = 0;
    while (bin > 0 && total < f.k) {
      --bin;
      within = 0;
      for (int64_t range = 0; range < ranges.count; ++range)
        within += counts[range * kBinsOfRange + bin];
      total += within;
    }
    if (total < f.k) {
      if (!h.low) return {0, total};  // fewer than k in all, which the caller has ruled out
      int shift = 0;
      while ((h.low + (uint64_t(1) << shift) - 1) >> shift > uint64_t(kMostBins)) ++shift;
      h = {0, shift, int((h.low + (uint64_t(1) << shift) - 1) >> shift)};
      continue;
    }
    const uint64_t low = h.low + (uint64_t(bin) << h.shift);
    if (!h.shift) return {uint32_t(low), total - within};
    const int shift = h.shift > 16 ? h.shift - 16 : 0;
    h = {low, shift, 1 << (h.shift - shift)};
  }
}

inline int64_t select(const Selection& f) {
  for (int64_t i = 0; i < f.count; ++i) f.counts[i] = 0;
  if (!f.k) return 0;
  const ScratchScope scope;
  const Ranges ranges(f);
  uint32_t* const counts = static_cast<uint32_t*>(
      scratch(Scratch::kColumnPanels, ranges.count * kBinsOfRange * int64_t(sizeof(uint32_t))));
  const Threshold threshold = find_threshold(f, ranges, counts);
  int64_t equal = f.k - threshold.above;

  // The first range writes where its positions stay. Of the others' buffers only what is used ever
  // becomes memory.
  Collected* const parts =
      static_cast<Collected*>(scratch(Scratch::kMask, ranges.count * int64_t(sizeof(Collected))));
  int64_t* const rest = static_cast<int64_t*>(
      scratch(Scratch::kRowPanels, ((ranges.count - 1) * f.k + 1) * int64_t(sizeof(int64_t))));
  parallel_for(f.threads, ranges.count, [&](int64_t range, int) {
    parts[range] = {range ? rest + (range - 1) * f.k : f.index, 0, 0};
    for_each_part(f, range * ranges.length, (range + 1) * ranges.length,
                  [&](const Scored& s, int64_t from, int64_t to) {
                    choose_loops(f.score, s.dtype)
                        .collect(f, s, from, to, threshold.key, equal, parts + range);
                  });
  });
  int64_t found = 0;
  for (int64_t range = 0; range < ranges.count; ++range)
    for (int64_t i = 0; i < parts[range].count && found < f.k; ++i) {
      const int64_t position = parts[range].positions[i], marked = position < 0;
      f.index[found] = position ^ -marked;
      found += !marked || equal > 0;
      equal -= marked;
    }
  // Where each tensor ends among them.
  int64_t begin = 0;
  for (int64_t i = 0; i < f.count; ++i) {
    int64_t end = begin, high = found;
    while (end < high) {
      const int64_t middle = (end + high) / 2;
      if (f.index[middle] < f.tensors[i].first + f.tensors[i].size)
        end = middle + 1;
      else
        high = middle;
    }
    f.counts[i] = end - begin;
    begin = end;
  }
  return found;
}

constexpr SelectKernels kSelect{select};

}  // namespace
