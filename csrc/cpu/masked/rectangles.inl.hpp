// Values of rectangles to and from the weight that they lie in. Header of the masked family's
// kernels, after the vocabulary of vec.inl.hpp.
namespace {

// How far ahead of a scattered element the line of the cache that holds it is asked for.
constexpr int64_t kElementsAhead = 48;

// body(offset in the weight, value from `begin` on, how many follow each other in both) for values
// [begin, begin + count).
template <class Index, class Body>
FT_INLINE void for_each_run(const Rectangles& r, int64_t begin, int64_t count, const Body& body) {
  const Index* const index = static_cast<const Index*>(r.index);
  const int64_t area = r.area();
  int64_t rectangle = begin / area, row = begin % area / r.columns, column = begin % r.columns;
  for (int64_t at = 0; at < count;) {
    const int64_t run = lesser(r.columns - column, count - at);
    body(int64_t(index[rectangle]) + row * r.stride + column, at, run);
    at += run;
    column = 0;
    if (++row == r.rows) {
      row = 0;
      ++rectangle;
    }
  }
}

// to[i] = the weight's element of value begin + i, in any element type of that size.
template <class T, class Index>
void fetch_values(const Rectangles& r, const T* weight, int64_t begin, int64_t count, T* to) {
  if (r.area() > 1) {
    for_each_run<Index>(r, begin, count, [&](int64_t offset, int64_t at, int64_t run) {
      memcpy(to + at, weight + offset, size_t(run) * sizeof(T));
    });
    return;
  }
  const Index* const index = static_cast<const Index*>(r.index) + begin;
  const int64_t known = r.count - begin;
  for (int64_t i = 0; i < count; ++i) {
    if (i + kElementsAhead < known) __builtin_prefetch(weight + index[i + kElementsAhead], 0);
    to[i] = weight[index[i]];
  }
}

// The weight's element of value begin + i = from[i].
template <class T, class Index>
void place_values(const Rectangles& r, T* weight, int64_t begin, int64_t count, const T* from) {
  if (r.area() > 1) {
    for_each_run<Index>(r, begin, count, [&](int64_t offset, int64_t at, int64_t run) {
      memcpy(weight + offset, from + at, size_t(run) * sizeof(T));
    });
    return;
  }
  const Index* const index = static_cast<const Index*>(r.index) + begin;
  const int64_t known = r.count - begin;
  for (int64_t i = 0; i < count; ++i) {
    if (i + kElementsAhead < known) __builtin_prefetch(weight + index[i + kElementsAhead], 1);
    weight[index[i]] = from[i];
  }
}

template <class T>
void fetch(const Rectangles& r, const void* weight, int64_t begin, int64_t count, T* to) {
  const auto own = r.index_bytes == 4 ? fetch_values<T, int32_t> : fetch_values<T, int64_t>;
  own(r, static_cast<const T*>(weight), begin, count, to);
}

template <class T>
void place(const Rectangles& r, void* weight, int64_t begin, int64_t count, const T* from) {
  const auto own = r.index_bytes == 4 ? place_values<T, int32_t> : place_values<T, int64_t>;
  own(r, static_cast<T*>(weight), begin, count, from);
}

template <class T>
FT_INLINE void widen(const T* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int n = int(lesser(kLanes, count - i));
    store(to + i, load(from + i, n), n);
  }
}

template <class T>
FT_INLINE void narrow(const float* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int n = int(lesser(kLanes, count - i));
    store(to + i, load(from + i, n), n);
  }
}

}  // namespace
