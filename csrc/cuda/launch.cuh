// Launching a kernel, and its error as a status of the ABI. Nothing here allocates or
// synchronises, so every launch can be captured into a CUDA graph.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "fastft/dtype.h"
#include "fastft/status.h"

namespace fastft {

constexpr int kThreads = 256;  // per block, of every kernel

template <class Integer>
FT_HOST_DEVICE Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

// What a block may have without asking: CUDA programming guide, technical specifications.
constexpr int kSharedWithoutAsking = 48 * 1024;

// Launch `blocks` blocks, each with so many bytes of shared memory beside what the kernel declares,
// on the caller's stream; no blocks, no launch. `op` is what an error names.
template <class... Parameters, class... Arguments>
int launch_with_shared(const char* op, void* stream, int64_t blocks, int shared_bytes,
                       void (*kernel)(Parameters...), Arguments... arguments) {
  if (blocks == 0) return 0;
  FT_CHECK(blocks <= INT32_MAX, "%s: %lld blocks exceed the grid", op,
           static_cast<long long>(blocks));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kSharedWithoutAsking)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  FT_CHECK(error == cudaSuccess, "%s: %s", op, cudaGetErrorString(error));
  return 0;
}

template <class... Parameters, class... Arguments>
int launch(const char* op, void* stream, int64_t blocks, void (*kernel)(Parameters...),
           Arguments... arguments) {
  return launch_with_shared(op, stream, blocks, 0, kernel, arguments...);
}

template <class T>
struct Type {
  using type = T;
};

// Call f(Type<base>, Type<adapter>) for the dtypes' codes: the adapter has the base's, or float32.
template <class F>
int with_dtypes(const char* op, int32_t dtype, int32_t adapter_dtype, F f) {
  if (dtype == FT_FLOAT32 && adapter_dtype == FT_FLOAT32) return f(Type<float>{}, Type<float>{});
  if (dtype == FT_BFLOAT16 && adapter_dtype == FT_BFLOAT16) return f(Type<bf16>{}, Type<bf16>{});
  if (dtype == FT_BFLOAT16 && adapter_dtype == FT_FLOAT32) return f(Type<bf16>{}, Type<float>{});
  if (dtype == FT_FLOAT16 && adapter_dtype == FT_FLOAT16) return f(Type<fp16>{}, Type<fp16>{});
  if (dtype == FT_FLOAT16 && adapter_dtype == FT_FLOAT32) return f(Type<fp16>{}, Type<float>{});
  return fail("%s: no kernel for dtype %d beside adapter dtype %d", op, dtype, adapter_dtype);
}

}  // namespace fastft
