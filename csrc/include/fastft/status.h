// Errors across the C ABI: a function returns 0, or 1 with a message for this thread.
#pragma once
#include <cstdarg>
#include <cstdio>

namespace fastft {

inline char* error_buffer() {
  static thread_local char buffer[512];
  return buffer;
}

// Store a message and return the failing status, so that a check reads `return fail("...", ...)`.
__attribute__((format(printf, 1, 2))) inline int fail(const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::vsnprintf(error_buffer(), 512, format, args);
  va_end(args);
  return 1;
}

}  // namespace fastft

// The contract has checked its arguments, so a failing check means a bug in an adapter.
#define FT_CHECK(condition, ...)                          \
  do {                                                    \
    if (!(condition)) return ::fastft::fail(__VA_ARGS__); \
  } while (0)
