"""Makes Triton's interpreter compute bfloat16 as a GPU does.

The interpreter holds bfloat16 as uint16 and, in Triton 3.6 to 3.9, computes on those bit patterns;
its casts to bfloat16 truncate. ``apply()`` replaces the operations so that they decode to float32,
compute, and round to nearest, ties to even. ``tl.sort`` on bfloat16 stays wrong.

conftest.py calls it before any kernel is defined; test_interpreter.py tests it.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

# These treat bfloat16's bits as bits, and are right as they are.
_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.where)


def decode(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bit patterns."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def encode(values: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns of float32 values, rounded to nearest, ties to even."""
    values = np.asarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    tie = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + tie) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def _is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _floats(handle: TensorHandle) -> np.ndarray:
    return decode(handle.data) if _is_bfloat16(handle) else handle.data


def _elementwise(original, operands: int):
    """binary_op and its like: ``operands`` handles, then the numpy function."""

    def compute(self, *args):
        handles, operation = args[:operands], args[operands]
        # A condition may come first: the last operand tells the type.
        if not _is_bfloat16(handles[-1]) or operation in _BITWISE:
            return original(self, *args)
        with np.errstate(all="ignore"):
            result = operation(*map(_floats, handles))
        return TensorHandle(result if result.dtype == np.bool_ else encode(result), tl.bfloat16)

    return compute


def _cast(original):
    def cast_impl(self, source, target):
        from_bfloat16 = _is_bfloat16(source)
        to_bfloat16 = target.scalar == tl.bfloat16
        if from_bfloat16 and not to_bfloat16:
            widened = TensorHandle(decode(source.data), tl.float32)
            return widened if target.scalar == tl.float32 else original(self, widened, target)
        if to_bfloat16 and not from_bfloat16:
            with np.errstate(over="ignore"):
                return TensorHandle(encode(source.data.astype(np.float32)), target.scalar)
        return original(self, source, target)

    return cast_impl


def _float_cast(original):
    def create_fp_to_fp(self, source, target, rounding):
        scalars = (source.dtype.scalar, target.scalar)
        nearest = rounding in (None, interpreter._ir.ROUNDING_MODE.RTNE)
        eight_bits = any(scalar.primitive_bitwidth == 8 for scalar in scalars)
        if tl.bfloat16 in scalars and nearest and not eight_bits:
            return self.cast_impl(source, target)
        return original(self, source, target, rounding)

    return create_fp_to_fp


def _fma(original):
    def create_fma(self, x, y, z):
        if not _is_bfloat16(z):
            return original(self, x, y, z)
        # 8 by 8 bits: the product is exact in float64.
        product = _floats(x).astype(np.float64) * _floats(y)
        return TensorHandle(encode((product + _floats(z)).astype(np.float32)), tl.bfloat16)

    return create_fma


def _dot(original):
    def create_dot(self, a, b, accumulator, *rest):
        a, b = (TensorHandle(_floats(h), tl.float32) if _is_bfloat16(h) else h for h in (a, b))
        return original(self, a, b, accumulator, *rest)

    return create_dot


def _along_axis(original):
    """sum, cumsum and cumprod: in float32, rounded once."""

    def reduce(self, values):
        if values.dtype.scalar != tl.bfloat16:
            return original(self, values)
        result = original(self, self.to_tensor(decode(values.handle.data), tl.float32))
        single = result[0] if isinstance(result, list) else result
        rounded = self.to_tensor(encode(single.handle.data), values.dtype)
        return [rounded] if isinstance(result, list) else rounded

    return reduce


def apply() -> None:
    """Repair the interpreter of this process; a second call does nothing."""
    if getattr(InterpreterBuilder, "_bfloat16_repaired", False):
        return
    InterpreterBuilder._bfloat16_repaired = True

    def replace(owner, name, wrap, *args):
        setattr(owner, name, wrap(getattr(owner, name), *args))

    replace(InterpreterBuilder, "binary_op", _elementwise, 2)
    replace(InterpreterBuilder, "unary_op", _elementwise, 1)
    replace(InterpreterBuilder, "ternary_op", _elementwise, 3)
    replace(InterpreterBuilder, "cast_impl", _cast)
    replace(InterpreterBuilder, "create_fp_to_fp", _float_cast)
    replace(InterpreterBuilder, "create_fma", _fma)
    replace(InterpreterBuilder, "create_dot", _dot)
    replace(interpreter.ReduceOps, "sum", _along_axis)
    replace(interpreter.ScanOps, "cumsum", _along_axis)
    replace(interpreter.ScanOps, "cumprod", _along_axis)
