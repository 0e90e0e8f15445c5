// The only file that knows Python: every function of ops.def becomes a keyword-only Python
// function that takes addresses as integers, releases the GIL and raises on a failing status.
// Compiled twice: as _cpu, and with FT_BIND_CUDA as _cuda.
#include <pybind11/pybind11.h>

#include <array>
#include <tuple>
#include <type_traits>
#include <utility>

#include "fastft/api.h"

namespace py = pybind11;

namespace {

void raise_on(int status) {
  if (status) throw std::runtime_error(ft_last_error());
}

// An int of Python's as a C parameter: an address as a pointer, a number as itself. False with a
// Python error set where it is no int or does not fit.
template <class T>
bool from_python(PyObject* value, T& to) {
  if constexpr (std::is_pointer_v<T>) {
    to = static_cast<T>(PyLong_AsVoidPtr(value));
    return to || !PyErr_Occurred();
  } else {
    const long long number = PyLong_AsLongLong(value);
    if (number == -1 && PyErr_Occurred()) return false;
    to = static_cast<T>(number);
    if (static_cast<long long>(to) == number) return true;
    PyErr_Format(PyExc_OverflowError, "%lld does not fit the C parameter", number);
    return false;
  }
}

// pybind11 would look every keyword up by name at every call, which costs as much as the rest of
// an op's way from Python to its kernel. Keywords arrive as an array of values and a tuple of
// names, and that tuple is one object for all calls from one line of code: where each value stands
// is found out when a new tuple comes.
template <auto Function>
struct Binding;
template <class... Args, int (*Function)(Args...)>
struct Binding<Function> {
  static constexpr size_t kCount = sizeof...(Args);
  inline static std::array<const char*, kCount> names;  // in C order
  inline static PyObject* seen = nullptr;               // the last tuple of names, owned
  inline static std::array<Py_ssize_t, kCount> place;   // of each parameter's value, for `seen`
  inline static PyMethodDef method;

  template <class... Names>
  static void define(py::module_& module, const char* name, Names... parameters) {
    static_assert(sizeof...(Names) == kCount, "one Python name per C parameter");
    names = {parameters...};
    const auto call_with_names = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call));
    method = {name, call_with_names, METH_FASTCALL | METH_KEYWORDS, nullptr};
    module.add_object(name, py::reinterpret_steal<py::object>(PyCFunction_New(&method, nullptr)));
  }

  static PyObject* call(PyObject*, PyObject* const* values, Py_ssize_t positional,
                        PyObject* given) {
    if ((positional || given != seen) && !learn(positional, given)) return nullptr;
    return call_with(values, std::index_sequence_for<Args...>{});
  }

  template <size_t... I>
  static PyObject* call_with(PyObject* const* values, std::index_sequence<I...>) {
    std::tuple<Args...> args;
    if (!(from_python(values[place[I]], std::get<I>(args)) && ...)) return nullptr;
    int status;
    Py_BEGIN_ALLOW_THREADS;
    status = std::apply(Function, args);
    Py_END_ALLOW_THREADS;
    if (status) {
      PyErr_SetString(PyExc_RuntimeError, ft_last_error());
      return nullptr;
    }
    Py_RETURN_NONE;
  }

  // Find each parameter among the names given; false with a TypeError set unless they are the same.
  static bool learn(Py_ssize_t positional, PyObject* given) {
    const Py_ssize_t count = given ? PyTuple_GET_SIZE(given) : 0;
    if (positional) {
      PyErr_Format(PyExc_TypeError, "%s() takes keyword arguments only", method.ml_name);
      return false;
    }
    std::array<Py_ssize_t, kCount> found;
    for (size_t i = 0; i < kCount; ++i) {
      found[i] = 0;
      while (found[i] < count &&
             PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(given, found[i]), names[i]))
        ++found[i];
      if (found[i] == count) {
        PyErr_Format(PyExc_TypeError, "%s() misses the argument '%s'", method.ml_name, names[i]);
        return false;
      }
    }
    if (count != Py_ssize_t(kCount)) {
      PyErr_Format(PyExc_TypeError, "%s() takes %zu arguments, got %zd", method.ml_name, kCount,
                   count);
      return false;
    }
    Py_INCREF(given);
    Py_XDECREF(std::exchange(seen, given));
    place = found;
    return true;
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
  module.def("pack_weight_bytes", [](int64_t n, int64_t k, int32_t dtype) {
    int64_t bytes;
    raise_on(ft_cpu_pack_weight_bytes(&bytes, n, k, dtype));
    return bytes;
  });
  module.def("isa", [] {
    int32_t detected, active;
    raise_on(ft_cpu_isa(&detected, &active));
    return py::make_tuple(detected, active);
  });
  module.def("set_isa", [](int32_t level) { raise_on(ft_cpu_set_isa(level)); });
}

#endif
