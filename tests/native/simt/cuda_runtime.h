// CUDA C++ on the CPU, for tests: included in place of the toolkit's header, it lets g++ compile
// a .cu file whose kernels then run under the sanitizers. One std::thread is one CUDA thread, and
// the blocks of a launch run one after another on the same threads.
//
// It has what the kernels use and no more: one-dimensional blocks, shared memory, __syncthreads,
// atomic operations on integers, and behind the functions of csrc/cuda/mma.cuh a warp's matrix
// product and asynchronous copies, which happen as late as they may: where they are waited for. A
// barrier is a mutex and a condition variable, not std::barrier, whose shared pool of waiters makes
// ThreadSanitizer see an order between threads that no barrier gave.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define FT_SIMT
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
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

// Every thread must come to the same barrier: `place` tells them apart, and a difference, which on
// a GPU is undefined behaviour, ends the program.
//
// Two gates take turns. With one, a thread that wakes late would take the lock after those that
// have already come to the next barrier, and ThreadSanitizer would see an order there.
class Barrier {
 public:
  explicit Barrier(unsigned threads) : threads_(threads) {}

  // `turn` counts this thread's barriers here.
  void wait(unsigned place, unsigned& turn) {
    Gate& gate = gates_[turn++ % 2];
    std::unique_lock<std::mutex> lock(gate.mutex);
    if (gate.arrived == 0) gate.place = place;
    if (place != gate.place) {
      std::fprintf(stderr, "simt: the threads of a block diverge at a barrier\n");
      std::abort();
    }
    const uint64_t phase = gate.phase;
    if (++gate.arrived == threads_) {
      gate.arrived = 0;
      ++gate.phase;
      gate.all_here.notify_all();
    } else {
      gate.all_here.wait(lock, [&] { return gate.phase != phase; });
    }
  }

 private:
  struct Gate {
    std::mutex mutex;
    std::condition_variable all_here;
    unsigned arrived = 0, place = 0;
    uint64_t phase = 0;
  };
  Gate gates_[2];
  const unsigned threads_;
};

inline thread_local Barrier* barrier;
inline thread_local unsigned turn, warp_turn;  // of this thread at its block's barrier, its warp's
inline thread_local unsigned passed;           // barriers of this thread in its block

// Which __syncthreads of each block is left out, counted from 1; 0 for none. A test that removes
// one sees whether the race detector would find a kernel that lacks it.
inline unsigned removed_barrier = 0;

constexpr unsigned kEndOfBlock = ~0u;

// Shared memory whose size the launch says; on the heap, so that what lies outside is found.
inline unsigned char* shared_memory = nullptr;
inline unsigned char* launch_shared() { return shared_memory; }

// What 32 threads hold while they multiply matrices.
struct Warp {
  Barrier barrier{32};
  uint32_t a[32][4], b[32][2];
};
inline thread_local Warp* warp;
inline thread_local unsigned products;  // of this thread

// c (16, 8) += a (16, 16) b (16, 8), the fragments as PTX has them for m16n8k16.
template <class ToFloat>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, ToFloat to_float) {
  const unsigned lane = threadIdx.x % 32;
  std::memcpy(warp->a[lane], a, sizeof a);
  warp->b[lane][0] = b0;
  warp->b[lane][1] = b1;
  warp->barrier.wait(++products, warp_turn);
  const auto half = [&](uint32_t word, unsigned k) {
    return to_float(uint16_t(word >> (k % 2 * 16)));
  };
  for (unsigned e = 0; e < 4; ++e) {
    const unsigned row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    for (unsigned k = 0; k < 16; ++k)
      c[e] += half(warp->a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k) *
              half(warp->b[column * 4 + k % 8 / 2][k / 8], k);
  }
  warp->barrier.wait(++products, warp_turn);
}

struct Copy {
  void* to;
  const void* from;
  bool inside;
};
inline thread_local std::vector<std::vector<Copy>> groups(1);  // the last one is open

inline void copy_async(void* to, const void* from, bool inside) {
  groups.back().push_back({to, from, inside});
}
inline void commit_copies() { groups.emplace_back(); }
inline void wait_for_copies(unsigned pending) {
  while (groups.size() > pending + 1) {
    for (const Copy& copy : groups.front()) {
      if (copy.inside)
        std::memcpy(copy.to, copy.from, 16);
      else
        std::memset(copy.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace simt

inline void __syncthreads() {
  if (++simt::passed != simt::removed_barrier) simt::barrier->wait(simt::passed, simt::turn);
}

// Relaxed, so that ThreadSanitizer sees no order in them that a GPU would not give.
template <class Integer>
Integer atomicAdd(Integer* to, Integer value) {
  return __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}
template <class Integer>
Integer atomicOr(Integer* to, Integer value) {
  return __atomic_fetch_or(to, value, __ATOMIC_RELAXED);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  simt::Barrier barrier(block.x);
  std::vector<simt::Warp> warps((block.x + 31) / 32);
  const std::unique_ptr<unsigned char[], decltype(&std::free)> shared(
      static_cast<unsigned char*>(
          std::aligned_alloc(16, (config->dynamicSmemBytes + 15) / 16 * 16)),
      std::free);
  simt::shared_memory = shared.get();
  const auto run = [&](unsigned thread) {
    simt::barrier = &barrier;
    simt::warp = &warps[thread / 32];
    threadIdx = dim3(thread, 0, 0);
    blockDim = block;
    gridDim = grid;
    for (unsigned b = 0; b < grid.x; ++b) {
      blockIdx = dim3(b, 0, 0);
      simt::passed = 0;
      kernel(arguments...);
      barrier.wait(simt::kEndOfBlock, simt::turn);
    }
  };
  std::vector<std::thread> threads;
  threads.reserve(block.x);
  for (unsigned thread = 0; thread < block.x; ++thread) threads.emplace_back(run, thread);
  for (std::thread& thread : threads) thread.join();
  return cudaSuccess;
}
