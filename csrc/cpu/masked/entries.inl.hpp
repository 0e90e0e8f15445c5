// Entries of a weight copied out and in, for one level of the instruction set: bit for bit, or
// rounded once to nearest from float32.
#include "cpu/vec.inl.hpp"
// After the vocabulary:
#include "cpu/masked/rectangles.inl.hpp"

namespace {

constexpr int64_t kEntryChunk = 512;
constexpr int64_t kEntryTask = 8192;

// body(first value, how many) over chunks of all values.
template <class Body>
void for_each_chunk(const Entries& f, const Body& body) {
  const int64_t values = f.at.values();
  parallel_for(values <= kEntryTask ? 1 : f.threads, ceil_div(values, kEntryTask),
               [&](int64_t task, int) {
                 const int64_t end = lesser(values, (task + 1) * kEntryTask);
                 for (int64_t at = task * kEntryTask; at < end; at += kEntryChunk)
                   body(at, lesser(kEntryChunk, end - at));
               });
}

inline void gather_entries(const Entries& f) {
  for_each_chunk(f, [&](int64_t at, int64_t count) {
    if (f.dtype == FT_FLOAT32)
      fetch(f.at, f.weight, at, count, static_cast<float*>(f.values) + at);
    else
      fetch(f.at, f.weight, at, count, static_cast<uint16_t*>(f.values) + at);
  });
}

// weight = values or weight += alpha * values in float32; T is the weight's type, V the values'.
template <class T, class V>
void scatter_entries(const Entries& f) {
  for_each_chunk(f, [&](int64_t at, int64_t count) {
    const V* const values = static_cast<const V*>(f.values) + at;
    T rounded[kEntryChunk];
    float wide[kEntryChunk];
    widen(values, count, wide);
    if (f.alpha) {
      float old[kEntryChunk];
      fetch(f.at, f.weight, at, count, rounded);
      widen(rounded, count, old);
      const Vec alpha = splat(*f.alpha);
      for (int64_t i = 0; i < count; i += kLanes) {
        const int n = int(lesser(kLanes, count - i));
        store(wide + i, fma(alpha, load(wide + i, n), load(old + i, n)), n);
      }
    }
    narrow(wide, count, rounded);
    place(f.at, f.weight, at, count, rounded);
  });
}

inline void scatter(const Entries& f) {
  if (!f.alpha && f.dtype == f.values_dtype) {  // bit for bit, NaNs included
    for_each_chunk(f, [&](int64_t at, int64_t count) {
      if (f.dtype == FT_FLOAT32)
        place(f.at, f.weight, at, count, static_cast<const float*>(f.values) + at);
      else
        place(f.at, f.weight, at, count, static_cast<const uint16_t*>(f.values) + at);
    });
  } else if (f.dtype == FT_FLOAT32) {
    scatter_entries<float, float>(f);
  } else if (f.dtype == FT_BFLOAT16) {
    f.values_dtype == FT_FLOAT32 ? scatter_entries<bf16, float>(f) : scatter_entries<bf16, bf16>(f);
  } else {
    f.values_dtype == FT_FLOAT32 ? scatter_entries<fp16, float>(f) : scatter_entries<fp16, fp16>(f);
  }
}

constexpr EntryKernels kEntries{gather_entries, scatter};

}  // namespace
