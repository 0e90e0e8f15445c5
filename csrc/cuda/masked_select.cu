// The k best entries of several tensors: exact, of equals the first, and the same bits every time.
//
// A score becomes a 32-bit key, ascending where the wanted come first; what is no number comes
// last. Three readings of the tensors count the keys' digits, from the high one down, among the
// keys that agree with the digits found: so the k-th key is known exactly. A fourth reading counts
// what each chunk gives, a scan says where it goes, and a fifth writes it there.
//
// A block has a chunk of one tensor. Counts are integers, in shared memory first: additions of them
// are exact in any order. What is excluded becomes one bit for each element of the chunk, in shared
// memory too. To collect in order a thread goes along kRun elements that stand side by side.
//
// Scores are one multiplication or subtraction in float32, as the reference's; none is written.
// Traffic: five readings of the tensors, and two words for each chunk.
#include "cuda/masked.cuh"
#include "fastft/api.h"

namespace fastft {
namespace {

constexpr int kRun = 16;                // elements of a thread, side by side
constexpr int kTile = kRun * kThreads;  // that a block collects at a time
constexpr int kChunk = 8 * kTile;       // of a block
constexpr int kDigits = 3;              // of a key, from the high one down
constexpr int kLowestBit[kDigits] = {21, 10, 0};
constexpr int kBits[kDigits] = {11, 11, 10};
constexpr int kMostBins = 1 << kBits[0];
constexpr int kGroup = 16;  // threads whose sum is one in a scan

// What is known of the k-th key: its first digits, and how many keys come before all that have
// them.
struct Chosen {
  uint64_t digits;
  int64_t before;
};

// Of a chunk: first how many keys it has, then how many stand in the chunks before it.
struct Place {
  int64_t before, equal;  // keys before the k-th, and its equals
};

struct Workspace {
  Chosen* chosen;
  uint64_t* counts;  // kMostBins of each digit
  Place* places;     // of each chunk, and of all

  explicit Workspace(int64_t* words)
      : chosen(reinterpret_cast<Chosen*>(words)),
        counts(reinterpret_cast<uint64_t*>(words + 2)),
        places(reinterpret_cast<Place*>(words + 2 + kDigits * kMostBins)) {}
  static int64_t words(int64_t blocks) { return 2 + kDigits * kMostBins + 2 * (blocks + 1); }
};

struct Selection {
  const ft_masked_scored* tensors;
  const Start* starts;
  const int64_t* rng;
  int64_t count, blocks, k;
  Score score;
  bool largest;
};

__device__ __forceinline__ float load(const void* data, int64_t dtype, int64_t at) {
  if (dtype == FT_FLOAT32) return static_cast<const float*>(data)[at];
  if (dtype == FT_BFLOAT16) return to_float(static_cast<const bf16*>(data)[at]);
  return to_float(static_cast<const fp16*>(data)[at]);
}

__device__ __forceinline__ float score_of(const ft_masked_scored& s, Score score, int64_t at) {
  const float a = load(s.a, s.dtype, at);
  switch (score) {
    case Score::kMagnitude:
      return fabsf(a);
    case Score::kSquare:
      return a * a;
    case Score::kProduct:
      return fabsf(a * load(s.b, s.dtype, at));
    case Score::kMovement:
      return -(a * load(s.b, s.dtype, at));
    case Score::kDifference:
      return fabsf(a - load(s.b, s.dtype, at));
    case Score::kScaled:
      return fabsf(a) * static_cast<const float*>(s.b)[at - quotient(at, s.columns) * s.columns];
    default:
      return a;
  }
}

// `before` is how many elements the tensors before have.
__device__ __forceinline__ uint32_t key_of(const Selection& f, const ft_masked_scored& s,
                                           int64_t before, int64_t at) {
  if (f.score == Score::kRandom) {
    const uint64_t position = uint64_t(before + at);
    const Philox4 words = philox4x32(uint64_t(f.rng[0]), position / 4, uint64_t(f.rng[1]));
    const uint32_t drawn = word_of(words, int(position % 4));
    return f.largest ? ~drawn : drawn;
  }
  float score = score_of(s, f.score, at);
  if (score != score) return 0xffffffffu;
  if (score == 0.0f) score = 0.0f;  // of both signs
  const uint32_t bits = float_bits(score);
  const uint32_t ascending = bits >> 31 ? ~bits : bits | 0x80000000u;
  return f.largest ? ~ascending : ascending;
}

// A block's chunk of a tensor, and which of its elements are excluded.
struct Chunk {
  ft_masked_scored tensor;
  int64_t before;      // elements of the tensors before
  int64_t first, end;  // within the tensor
  const uint32_t* excluded;

  __device__ bool has(int64_t at) const {
    const int64_t i = at - first;
    return at < end && (!tensor.excluded || !(excluded[i / 32] >> i % 32 & 1u));
  }
};

// All threads of the block must call it, once.
__device__ inline Chunk chunk_of_block(const Selection& f) {
  __shared__ uint32_t excluded[kChunk / 32];
  const int64_t number = tensor_of_block(f.starts, f.count);
  const ft_masked_scored s = f.tensors[number];
  const int64_t first = (int64_t(blockIdx.x) - f.starts[number].blocks) * kChunk;
  const int64_t end = first + kChunk < s.size ? first + kChunk : s.size;
  const Chunk chunk{s, f.starts[number].values, first, end, excluded};
  if (!s.excluded) return chunk;
  for (int i = int(threadIdx.x); i < kChunk / 32; i += kThreads) excluded[i] = 0;
  __syncthreads();
  const Rectangles left_out = excluded_of(s);
  int64_t low = 0, high = left_out.count;  // how many are below the chunk
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (left_out.start(middle) < first)
      low = middle + 1;
    else
      high = middle;
  }
  for (int64_t i = low + threadIdx.x; i < left_out.count; i += kThreads) {
    const int64_t at = left_out.start(i) - first;
    if (at >= kChunk) break;
    atomicOr(excluded + at / 32, 1u << at % 32);
  }
  __syncthreads();
  return chunk;
}

// The sum over the threads before this one, and that over all; both Sums of at most 64 bits. All
// threads must call it.
template <class Sum>
__device__ __forceinline__ Sum sum_before(Sum own, Sum* all) {
  constexpr int kGroups = kThreads / kGroup;
  __shared__ Sum sums[kThreads], groups[kGroups];
  const int thread = int(threadIdx.x), group = thread / kGroup;
  __syncthreads();  // the last call's are read
  sums[thread] = own;
  __syncthreads();
  if (thread < kGroups) {
    Sum sum = 0;
    for (int i = 0; i < kGroup; ++i) sum += sums[thread * kGroup + i];
    groups[thread] = sum;
  }
  __syncthreads();
  Sum before = 0, total = 0;
  for (int i = 0; i < kGroups; ++i) {
    if (i < group) before += groups[i];
    total += groups[i];
  }
  for (int i = group * kGroup; i < thread; ++i) before += sums[i];
  *all = total;
  return before;
}

// Adds to the counts of a digit how many keys of a chunk, of those that begin as chosen, have it.
__global__ __launch_bounds__(kThreads) void select_count(Selection f, uint64_t* counts,
                                                         const Chosen* chosen, int lowest_bit,
                                                         int bits) {
  __shared__ uint32_t own[kMostBins];
  const int bins = 1 << bits;
  for (int i = int(threadIdx.x); i < bins; i += kThreads) own[i] = 0;
  const Chunk chunk = chunk_of_block(f);  // with a barrier at least
  const uint64_t digits = chosen->digits;
  for (int64_t at = chunk.first + threadIdx.x; at < chunk.end; at += kThreads) {
    if (!chunk.has(at)) continue;
    const uint32_t shifted = key_of(f, chunk.tensor, chunk.before, at) >> lowest_bit;
    if (shifted >> bits == digits) atomicAdd(own + (shifted & uint32_t(bins - 1)), 1u);
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < bins; i += kThreads)
    if (own[i])
      atomicAdd(reinterpret_cast<unsigned long long*>(counts) + i, (unsigned long long)own[i]);
}

// Extends what is chosen by the digit in which the k-th key falls. One block.
__global__ __launch_bounds__(kThreads) void select_choose(Chosen* chosen, const uint64_t* counts,
                                                          int64_t k, int bits) {
  const int each = (1 << bits) / kThreads, first = int(threadIdx.x) * each;
  int64_t own = 0, all;
  for (int i = 0; i < each; ++i) own += int64_t(counts[first + i]);
  const Chosen until = *chosen;
  int64_t before = until.before + sum_before(own, &all);
  if (before >= k || before + own < k) return;
  int bin = first;
  while (before + int64_t(counts[bin]) < k) before += int64_t(counts[bin++]);
  *chosen = {until.digits << bits | uint64_t(bin), before};
}

// How many keys of a chunk come before the k-th and how many equal it; or, with kWrite, the
// positions of those selected, where they belong.
template <bool kWrite>
__global__ __launch_bounds__(kThreads, 4) void select_collect(Selection f, int64_t* index,
                                                              Place* places, const Chosen* chosen) {
  const Chunk chunk = chunk_of_block(f);
  const uint32_t last = uint32_t(chosen->digits);
  const int64_t wanted = f.k - chosen->before;  // of its equals
  Place place = kWrite ? places[blockIdx.x] : Place{0, 0};
  for (int64_t tile = chunk.first; tile < chunk.end; tile += kTile) {
    const int64_t first = tile + int(threadIdx.x) * kRun;
    uint32_t is_before = 0, is_equal = 0;  // a bit for each element of the run
    uint32_t own = 0, all;                 // counts of both, in 16 bits each
#pragma unroll 2
    for (int i = 0; i < kRun; ++i) {
      if (!chunk.has(first + i)) continue;
      const uint32_t key = key_of(f, chunk.tensor, chunk.before, first + i);
      is_before |= uint32_t(key < last) << i;
      is_equal |= uint32_t(key == last) << i;
      own += uint32_t(key < last) + (uint32_t(key == last) << 16);
    }
    const uint32_t sum = sum_before(own, &all);
    if (kWrite) {
      int64_t before = place.before + (sum & 0xffffu), equal = place.equal + (sum >> 16);
      for (int i = 0; i < kRun; ++i) {
        const bool selected = is_before >> i & 1u || (is_equal >> i & 1u && equal < wanted);
        if (selected) index[before + (equal < wanted ? equal : wanted)] = chunk.before + first + i;
        before += is_before >> i & 1u;
        equal += is_equal >> i & 1u;
      }
    }
    place.before += all & 0xffffu;
    place.equal += all >> 16;
  }
  if (!kWrite && threadIdx.x == 0) places[blockIdx.x] = place;
}

// Makes of each chunk's counts those of the chunks before it, and says how many of each tensor are
// selected. One block, whose threads have chunks that stand side by side.
__global__ __launch_bounds__(kThreads) void select_scan(Selection f, int64_t* counts, Place* places,
                                                        const Chosen* chosen) {
  const int64_t each = ceil_div<int64_t>(f.blocks, kThreads), first = int(threadIdx.x) * each;
  const int64_t end = first + each < f.blocks ? first + each : f.blocks;
  Place own{0, 0}, all;
  for (int64_t i = first; i < end; ++i) {
    own.before += places[i].before;
    own.equal += places[i].equal;
  }
  Place place;
  place.before = sum_before(own.before, &all.before);
  place.equal = sum_before(own.equal, &all.equal);
  for (int64_t i = first; i < end; ++i) {
    const Place chunk = places[i];
    places[i] = place;
    place.before += chunk.before;
    place.equal += chunk.equal;
  }
  if (threadIdx.x == 0) places[f.blocks] = all;
  __syncthreads();
  const int64_t wanted = f.k - chosen->before;
  const auto selected_before = [&](int64_t chunk) {
    const Place at = places[chunk];
    return at.before + (at.equal < wanted ? at.equal : wanted);
  };
  for (int64_t i = threadIdx.x; i < f.count; i += kThreads)
    counts[i] = selected_before(f.starts[i + 1].blocks) - selected_before(f.starts[i].blocks);
}

}  // namespace
}  // namespace fastft

using namespace fastft;

int ft_cuda_select_topk_plan(int64_t* starts, int64_t* words, const ft_masked_scored* tensors,
                             int64_t count) {
  const char* op = "select_topk";
  Start* const to = reinterpret_cast<Start*>(starts);
  to[0] = {0, 0};
  for (int64_t i = 0; i < count; ++i) {
    const ft_masked_scored& s = tensors[i];
    FT_CHECK(s.dtype >= FT_FLOAT32 && s.dtype <= FT_FLOAT16, "%s: unknown dtype code %lld", op,
             static_cast<long long>(s.dtype));
    FT_CHECK(s.size >= 0 && s.columns >= 1, "%s: %lld elements in rows of %lld", op,
             static_cast<long long>(s.size), static_cast<long long>(s.columns));
    if (check_sizes(op, excluded_of(s))) return 1;
    to[i + 1] = {to[i].blocks + ceil_div<int64_t>(s.size, kChunk), to[i].values + s.size};
  }
  *words = Workspace::words(to[count].blocks);
  return 0;
}

int ft_cuda_select_topk(int64_t* index, int64_t* counts, int64_t* workspace,
                        const ft_masked_scored* tensors, const int64_t* starts, const int64_t* rng,
                        int64_t words, int64_t count, int64_t blocks, int64_t k, int32_t score,
                        int32_t largest, void* stream) {
  const char* op = "select_topk";
  FT_CHECK(score >= 0 && score < int32_t(Score::kCount), "%s: unknown score %d", op, score);
  FT_CHECK(score != int32_t(Score::kRandom) || rng, "%s: a random score without rng", op);
  FT_CHECK(k >= 1 && blocks >= 1, "%s: k %lld of %lld chunks", op, static_cast<long long>(k),
           static_cast<long long>(blocks));
  FT_CHECK(words == Workspace::words(blocks), "%s: a workspace of %lld words, %lld needed", op,
           static_cast<long long>(words), static_cast<long long>(Workspace::words(blocks)));
  const Selection f{tensors,
                    reinterpret_cast<const Start*>(starts),
                    rng,
                    count,
                    blocks,
                    k,
                    static_cast<Score>(score),
                    largest != 0};
  const Workspace w(workspace);
  for (int digit = 0; digit < kDigits; ++digit) {
    uint64_t* const own = w.counts + digit * kMostBins;
    if (launch(op, stream, blocks, select_count, f, own, w.chosen, kLowestBit[digit],
               kBits[digit]) ||
        launch(op, stream, 1, select_choose, w.chosen, own, k, kBits[digit]))
      return 1;
  }
  if (launch(op, stream, blocks, select_collect<false>, f, index, w.places, w.chosen) ||
      launch(op, stream, 1, select_scan, f, counts, w.places, w.chosen))
    return 1;
  return launch(op, stream, blocks, select_collect<true>, f, index, w.places, w.chosen);
}
