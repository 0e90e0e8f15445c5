// The GEMM core's own kernels, for one level of the instruction set: a plain product, and weights
// packed once.
#include "cpu/vec.inl.hpp"
// After the vocabulary:
#include "cpu/dropout.inl.hpp"
#include "cpu/gemm.inl.hpp"

namespace {

inline void matmul(const Matmul& f) {
  const ScratchScope scope;
  const Operand b = !f.packed_b           ? dense(f.b, f.b_stride_n, f.b_stride_k)
                    : f.packed_transposed ? packed_transposed(f.packed_b)
                                          : packed_columns(f.packed_b);
  const Product ab = product(dense(f.a, f.a_stride_m, f.a_stride_k), f.dtype, b, f.dtype, f.k);
  gemm(f.m, f.n, &ab, 1, result(f.c, f.dtype, f.n, 1), f.threads);
}

// body(first line, lines, first item, items, where they stand in the packed form) for all of W.
template <class T, class Body>
void for_each_packed_strip(const PackedWeight& w, int threads, const Body& body) {
  const Strips strips = strips_of(w);
  parallel_for(threads, strips.count(), [&](int64_t strip, int) {
    const int64_t items = depth_of(w).items();
    for (int64_t p = 0; p < items; p += w.block)
      body(strips.line(strip), strips.lines(strip), p, lesser(w.block, items - p),
           const_cast<T*>(packed_items<T>(w, strip, p)));
  });
}

// Half-precision values are stored as they are.
inline void pack_halves(const WeightPacking& f, const PackedWeight& w) {
  const uint16_t* weight = static_cast<const uint16_t*>(f.weight);
  for_each_packed_strip<uint16_t>(
      w, f.threads, [&](int64_t line, int lines, int64_t p, int64_t items, uint16_t* to) {
        for (int64_t item = 0; item < items; ++item)
          for (int lane = 0; lane < kLanes; ++lane)
            to[item * kLanes + lane] =
                lane < lines ? weight[(line + lane) * f.stride_n + (p + item) * f.stride_k] : 0;
      });
}

inline void pack_weight(const WeightPacking& f) {
  const bool pairs = FT_BF16_DOT && f.dtype == FT_BFLOAT16;
  PackedWeight& w = *static_cast<PackedWeight*>(f.packed);
  w = {kPackedMagic, f.dtype, kLanes, pairs, f.n, f.k, kDepthItems, {}};
  if (f.dtype != FT_FLOAT32 && !pairs) return pack_halves(f, w);
  Packing packing{dense(f.weight, f.stride_n, f.stride_k), depth_of(w),
                  reinterpret_cast<float*>(&w + 1)};
  choose_packer(packing.operand, f.dtype, pairs);
  pack_panels(&packing, 1, strips_of(w), f.threads);
}

template <class T>
void unpack_values(const WeightPacking& f, const PackedWeight& w) {
  T* weight = static_cast<T*>(f.weight);
  const int per_item = w.pairs ? 2 : 1;
  for_each_packed_strip<T>(
      w, f.threads, [&](int64_t line, int lines, int64_t p, int64_t items, T* from) {
        const int64_t values = lesser(items * per_item, w.k - p * per_item);
        for (int lane = 0; lane < lines; ++lane)
          for (int64_t at = 0; at < values; ++at)
            weight[(line + lane) * w.k + p * per_item + at] =
                from[(at / per_item * kLanes + lane) * per_item + at % per_item];
      });
}

inline void unpack_weight(const WeightPacking& f) {
  const PackedWeight& w = header_of(f.packed);
  w.dtype == FT_FLOAT32 ? unpack_values<float>(f, w) : unpack_values<uint16_t>(f, w);
}

constexpr MatmulKernels kMatmul{matmul, pack_weight, unpack_weight};

}  // namespace
