// Threads and scratch memory of the CPU kernels.
//
// A kernel cuts its outputs into tasks and never a reduction, so its bits depend neither on the
// number of threads nor on which thread ran what.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fastft {

// `requested`, or 1 in a child that was forked: the OpenMP pool does not survive a fork, and a
// parallel region there would wait for its threads for ever.
int usable_threads(int requested);

// body(task, worker) for every task in [0, tasks); worker is below `threads`. The body must not
// throw.
template <class Body>
void parallel_for(int threads, int64_t tasks, const Body& body) {
#if defined(_OPENMP)
  if (threads > tasks) threads = int(tasks);
  if (threads > 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t task = 0; task < tasks; ++task) body(task, omp_get_thread_num());
    return;
  }
#endif
  for (int64_t task = 0; task < tasks; ++task) body(task, 0);
}

// The scratch buffers of one thread that calls kernels. They stay allocated from call to call,
// because the page faults of a fresh buffer cost as much as a small kernel.
enum class Scratch {
  kMask,
  kLowRank,
  kSharedRows,
  kOrdered,
  kSums,
  kGradient,
  kRowPanels,
  kColumnPanels,
  kWorkers,
  kCount
};

// At least `bytes` bytes, aligned for any vector, contents undefined; valid until the next request
// for the same buffer from this thread. Throws std::bad_alloc.
void* scratch(Scratch which, int64_t bytes);

// Asks the operating system for huge pages in memory that has not been touched yet: fewer page
// faults now, fewer misses of the TLB later.
void prefer_huge_pages(void* data, int64_t bytes);

// Ends a call of a kernel: gives back the buffers too large to keep.
struct ScratchScope {
  ~ScratchScope();
};

constexpr int64_t kCacheLine = 64;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace fastft
