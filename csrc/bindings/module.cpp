// The only file that knows Python: every function of ops.def becomes a keyword-only Python
// function that takes addresses as integers, releases the GIL and raises on a failing status.
// Compiled twice: as _cpu, and with FT_BIND_CUDA as _cuda.
#include <pybind11/pybind11.h>

#include <string>
#include <type_traits>

#include "fastft/api.h"

namespace py = pybind11;

namespace {

// What crosses from Python for a C parameter: an address for a pointer, itself for a number.
template <class T>
using arg_t = std::conditional_t<std::is_pointer_v<T>, std::uintptr_t, T>;

template <class T>
T to_c(arg_t<T> value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value);
  } else {
    return value;
  }
}

void raise_on(int status) {
  if (status) throw std::runtime_error(ft_last_error());
}

template <auto Function>
struct Binding;
template <class... Args, int (*Function)(Args...)>
struct Binding<Function> {
  static void call(arg_t<Args>... args) {
    int status;
    {
      py::gil_scoped_release unlocked;
      status = Function(to_c<Args>(args)...);
    }
    raise_on(status);
  }

  template <class... Names>
  static void define(py::module_& module, const char* name, Names... names) {
    static_assert(sizeof...(Names) == sizeof...(Args), "one Python name per C parameter");
    module.def(name, &call, py::kw_only(), py::arg(names)...);
  }
};

}  // namespace

#ifdef FT_BIND_CUDA

PYBIND11_MODULE(_cuda, module) {
#define FT_CPU_OP(name, ...)
#define FT_CUDA_OP(name, ...) Binding<&ft_cuda_##name>::define(module, #name, __VA_ARGS__);
#include "fastft/ops.def"
  module.def("lora_up_grad_workspace", [](int64_t m, int64_t n, int64_t r) {
    int64_t floats;
    raise_on(ft_cuda_lora_up_grad_workspace(&floats, m, n, r));
    return floats;
  });
  module.def("lora_down_grad_workspace", [](int64_t m, int64_t k, int64_t r) {
    int64_t floats;
    raise_on(ft_cuda_lora_down_grad_workspace(&floats, m, k, r));
    return floats;
  });
}

#else

PYBIND11_MODULE(_cpu, module) {
#define FT_CPU_OP(name, ...) Binding<&ft_cpu_##name>::define(module, #name, __VA_ARGS__);
#define FT_CUDA_OP(name, ...)
#include "fastft/ops.def"
  module.def("isa", [] {
    int32_t detected, active;
    raise_on(ft_cpu_isa(&detected, &active));
    return py::make_tuple(detected, active);
  });
  module.def("set_isa", [](int32_t level) { raise_on(ft_cpu_set_isa(level)); });
}

#endif
