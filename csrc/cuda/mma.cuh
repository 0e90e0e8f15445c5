// Tensor-core products of half precision with float32 sums, and asynchronous copies into shared
// memory: what the hardware does beyond one thread, each behind one function. On the CPU the SIMT
// shim of the tests computes the same with loops.
#pragma once
#include <cstdint>
#include <type_traits>

#include "cuda/launch.cuh"
#include "fastft/dtype.h"

// Shared memory whose size the launch says.
#ifdef FT_SIMT
#define FT_LAUNCH_SHARED(name) unsigned char* const name = simt::launch_shared()
#else
#define FT_LAUNCH_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace fastft {

// c (16, 8) += a (16, 16) b (16, 8), of one warp; PTX's m16n8k16. With g = lane / 4, t = lane % 4 a
// lane holds, two halves a word, the first in the low one:
//   a: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), each with the column after it
//   b: rows 2t and 2t + 1, rows 2t + 8 and 2t + 9, of column g
//   c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
#if defined(FT_SIMT)
  simt::mma(c, a, b0, b1, [](uint16_t bits) { return to_float(T{bits}); });
#elif defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

// a + b of two pairs of halves. As a product with 1: sm_80 has no addition of bf16 pairs.
template <class T>
__device__ __forceinline__ uint32_t add_halves(uint32_t a, uint32_t b) {
#if defined(FT_SIMT)
  const auto add = [](uint16_t x, uint16_t y) {
    return from_float<T>(to_float(T{x}) + to_float(T{y})).bits;
  };
  return uint32_t(add(uint16_t(a >> 16), uint16_t(b >> 16))) << 16 | add(uint16_t(a), uint16_t(b));
#elif defined(__CUDA_ARCH__)
  uint32_t sum;
  if constexpr (std::is_same_v<T, bf16>)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80u), "r"(b));
  else
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
#else
  return 0;  // nvcc reads this for the host, where nothing calls it
#endif
}

// 16 bytes of global memory into shared memory, or 16 zeros; there once waited for. Both aligned.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside) {
#if defined(FT_SIMT)
  simt::copy_async(shared, global, inside);
#elif defined(__CUDA_ARCH__)
  const uint32_t target = uint32_t(__cvta_generic_to_shared(shared));
  const int bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(global),
               "r"(bytes)
               : "memory");
#endif
}

// Ends a group of copies.
__device__ __forceinline__ void commit_copies() {
#if defined(FT_SIMT)
  simt::commit_copies();
#elif defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until this thread's copies are there, those of its last kPending groups excepted.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
#if defined(FT_SIMT)
  simt::wait_for_copies(kPending);
#elif defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace fastft
