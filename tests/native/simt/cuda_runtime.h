// CUDA C++ on the CPU, for tests: included in place of the toolkit's header, it lets g++ compile
// a .cu file whose kernels then run under the sanitizers. One std::thread is one CUDA thread, and
// the blocks of a launch run one after another on the same threads.
//
// It has what the kernels use and no more: one-dimensional blocks, static shared memory and
// __syncthreads. A barrier is a mutex and a condition variable, not std::barrier, whose shared
// pool of waiters makes ThreadSanitizer see an order between threads that no barrier gave.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time, so one copy serves

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

// Every thread must come to the same barrier: `place` tells them apart, and a difference, which on
// a GPU is undefined behaviour, ends the program.
class Barrier {
 public:
  explicit Barrier(unsigned threads) : threads_(threads) {}

  void wait(unsigned place) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (arrived_ == 0) place_ = place;
    if (place != place_) {
      std::fprintf(stderr, "simt: the threads of a block diverge at a barrier\n");
      std::abort();
    }
    const uint64_t phase = phase_;
    if (++arrived_ == threads_) {
      arrived_ = 0;
      ++phase_;
      all_here_.notify_all();
    } else {
      all_here_.wait(lock, [&] { return phase_ != phase; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_here_;
  const unsigned threads_;
  unsigned arrived_ = 0, place_ = 0;
  uint64_t phase_ = 0;
};

inline thread_local Barrier* barrier;
inline thread_local unsigned passed;  // barriers of this thread in its block

// Which __syncthreads of each block is left out, counted from 1; 0 for none. A test that removes
// one sees whether the race detector would find a kernel that lacks it.
inline unsigned removed_barrier = 0;

constexpr unsigned kEndOfBlock = ~0u;

}  // namespace simt

inline void __syncthreads() {
  if (++simt::passed != simt::removed_barrier) simt::barrier->wait(simt::passed);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  simt::Barrier barrier(block.x);
  const auto run = [&](unsigned thread) {
    simt::barrier = &barrier;
    threadIdx = dim3(thread, 0, 0);
    blockDim = block;
    gridDim = grid;
    for (unsigned b = 0; b < grid.x; ++b) {
      blockIdx = dim3(b, 0, 0);
      simt::passed = 0;
      kernel(arguments...);
      barrier.wait(simt::kEndOfBlock);
    }
  };
  std::vector<std::thread> threads;
  threads.reserve(block.x);
  for (unsigned thread = 0; thread < block.x; ++thread) threads.emplace_back(run, thread);
  for (std::thread& thread : threads) thread.join();
  return cudaSuccess;
}
