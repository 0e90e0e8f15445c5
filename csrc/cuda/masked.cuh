// What the masked family's kernels share: many tensors in one launch, and random words.
#pragma once
#include "cuda/launch.cuh"
#include "fastft/masked.h"
#include "fastft/philox.h"

namespace fastft {

// How many blocks, and how many values or elements, the tensors before one have; a row of the
// plans' starts.
struct Start {
  int64_t blocks, values;
};

// The number of this block's tensor. All threads of the block must call it, once: each looks at
// some of the tensors, and one finds it.
__device__ inline int64_t tensor_of_block(const Start* starts, int64_t count) {
  __shared__ int64_t found;
  const int64_t block = blockIdx.x;
  for (int64_t i = threadIdx.x; i < count; i += kThreads)
    if (starts[i].blocks <= block && block < starts[i + 1].blocks) found = i;
  __syncthreads();
  return found;
}

// A word of four by a number that is not known when compiling: as an index it would put them into
// memory.
FT_HOST_DEVICE uint32_t word_of(const Philox4& words, int i) {
  const uint32_t low = i == 0 ? words.word[0] : words.word[1];
  const uint32_t high = i == 2 ? words.word[2] : words.word[3];
  return i < 2 ? low : high;
}

// Quotients of what mostly has 32 bits, whose division takes a third of the instructions.
FT_HOST_DEVICE int64_t quotient(int64_t a, int64_t b) {
  return (a | b) >> 32 ? a / b : int64_t(uint32_t(a) / uint32_t(b));
}

}  // namespace fastft
