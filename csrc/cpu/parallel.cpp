#include "cpu/parallel.h"

#include <cstdlib>
#include <new>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <sys/mman.h>
#define FT_CAN_FORK 1
#endif

namespace fastft {
namespace {

bool forked = false;

#if defined(FT_CAN_FORK)
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kKept = size_t(64) << 20;

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;

  Buffer() = default;
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(data); }

  void reserve(size_t wanted) {
    if (wanted <= bytes) return;
    std::free(data);
    bytes = 0;
    const size_t alignment = wanted < kHugePage ? size_t(kCacheLine) : kHugePage;
    wanted = (wanted + alignment - 1) / alignment * alignment;
    data = std::aligned_alloc(alignment, wanted);
    if (!data) throw std::bad_alloc();
    prefer_huge_pages(data, int64_t(wanted));
    bytes = wanted;
  }

  void trim() {
    if (bytes <= kKept) return;
    std::free(data);
    data = nullptr;
    bytes = 0;
  }
};

thread_local Buffer buffers[int(Scratch::kCount)];

}  // namespace

int usable_threads(int requested) { return forked || requested < 1 ? 1 : requested; }

void* scratch(Scratch which, int64_t bytes) {
  Buffer& buffer = buffers[int(which)];
  buffer.reserve(size_t(bytes));
  return buffer.data;
}

void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t begin = (uintptr_t(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (uintptr_t(data) + uintptr_t(bytes)) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

ScratchScope::~ScratchScope() {
  for (Buffer& buffer : buffers) buffer.trim();
}

}  // namespace fastft
