// Compiles the kernel bodies of FT_BODY once per level of the instruction set:
//   #define FT_BODY "cpu/lora/linear.inl.hpp"
//   #include "cpu/isa.h"
// Each copy stands in its own namespace (fastft::scalar, fastft::avx2, ...) and in a region that
// switches the instructions on, for the functions defined inside only. What a body needs of the
// standard library is included here, before the regions: an inline function of std:: compiled
// inside one would be shared, through its weak symbol, with code that must run everywhere. For the
// same reason bodies instantiate no template of std:: and define nothing with external linkage.
//
// Inside a body: FT_LANES, floats per vector; FT_BF16_DOT, whether vdpbf16ps exists; FT_VNNI,
// whether vpdpbusd does, which every CPU with the former has.
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/pack.h"
#include "cpu/parallel.h"
#include "fastft/api.h"
#include "fastft/codebook.h"
#include "fastft/dtype.h"
#include "fastft/philox.h"
#include "fastft/rounding.h"

// A vector crosses only functions that are inlined, so its calling convention does not matter.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"
// GCC 12's own intrinsics start from a register that is undefined on purpose (bug 105593).
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define FT_LANES 4
#define FT_BF16_DOT 0
#define FT_VNNI 0
namespace fastft {
namespace scalar {
#include FT_BODY
}
}  // namespace fastft
#undef FT_LANES
#undef FT_BF16_DOT
#undef FT_VNNI

#if defined(__x86_64__)

#if defined(__clang__)
#define FT_PRAGMA(text) _Pragma(#text)
#define FT_REGION_BEGIN(target) \
  FT_PRAGMA(clang attribute push(__attribute__((target(target))), apply_to = function))
#define FT_REGION_END _Pragma("clang attribute pop")
#else
#define FT_PRAGMA(text) _Pragma(#text)
#define FT_REGION_BEGIN(level) _Pragma("GCC push_options") FT_PRAGMA(GCC target(level))
#define FT_REGION_END _Pragma("GCC pop_options")
#endif

#define FT_LANES 8
#define FT_BF16_DOT 0
#define FT_VNNI 0
FT_REGION_BEGIN("avx2,fma,f16c")
namespace fastft {
namespace avx2 {
#include FT_BODY
}
}  // namespace fastft
FT_REGION_END
#undef FT_LANES

#define FT_LANES 16
FT_REGION_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
namespace fastft {
namespace avx512 {
#include FT_BODY
}
}  // namespace fastft
FT_REGION_END
#undef FT_BF16_DOT
#undef FT_VNNI

#define FT_BF16_DOT 1
#define FT_VNNI 1
FT_REGION_BEGIN("avx512bf16,avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")
namespace fastft {
namespace avx512_bf16 {
#include FT_BODY
}
}  // namespace fastft
FT_REGION_END
#undef FT_LANES
#undef FT_BF16_DOT
#undef FT_VNNI

#endif  // __x86_64__

#pragma GCC diagnostic pop
