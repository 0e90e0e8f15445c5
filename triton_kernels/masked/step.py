"""The masked optimizer steps on Triton: the trained parts of all weights in one launch.

Symbols as in ``pyfastft/ops/masked.md``. A launch takes the weights of one dtype whose indices have
one dtype; models mostly have one such kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from pyfastft._op import implement
from pyfastft._random import GROUP
from pyfastft.ops.masked._rectangles import expect_index, matrix_of
from pyfastft.triton_kernels._common import DOT_TYPES, _philox
from pyfastft.triton_kernels.masked._rectangles import (
    EXACT_OPTIONS,
    offsets_of_values,
    search_steps,
    tensor_of,
    unsupported,
)

_BLOCK = 512
_INDEX_TYPES = {torch.int32: tl.int32, torch.int64: tl.int64}
# Blocks before, weight, value, first, second, grad, index, values, rows, columns, row's length,
# values before.
_FIELDS = 12
# sign, and seven of the method's own.
_FACTORS = 8
_GROUP = tl.constexpr(GROUP)


@triton.jit
def _random_bits(rng_ptr, value):
    """16 random bits for each value, by its number; as ``reference.masked.step.draws``."""
    w0, w1, w2, w3 = _philox(rng_ptr, value // _GROUP)
    half = (value % _GROUP).to(tl.int32)
    word = tl.where(half < 4, tl.where(half < 2, w0, w1), tl.where(half < 6, w2, w3))
    return tl.where(half % 2 == 0, word & 0xFFFF, word >> 16)


@triton.jit
def _round_stochastic(value, random, TO: tl.constexpr):
    """float32 to half precision, up with the probability of what is lost; float32 stays."""
    nearest = value.to(TO)
    bits = value.to(tl.uint32, bitcast=True)
    if tl.bfloat16 == TO:
        rounded = ((bits + random) & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.where((bits & 0x7F800000) != 0x7F800000, rounded.to(TO), nearest)
    elif tl.float16 == TO:
        magnitude = tl.abs(value)
        normal = ((bits + (random >> 3)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        # Subnormals of float16, in units of the last bit.
        units = magnitude * 16777216.0
        whole = tl.floor(units)
        up = ((units - whole) * 65536.0 > random.to(tl.float32)).to(tl.float32)
        small = (whole + up) * 5.9604644775390625e-08
        small = tl.where((bits >> 31) != 0, -small, small)
        rounded = tl.where(magnitude < 6.103515625e-05, small, normal)
        return tl.where(magnitude < 65536.0, rounded.to(TO), nearest)
    else:
        return nearest


@triton.jit
def _masked_step_kernel(
    table_ptr,
    factors_ptr,
    rng_ptr,
    segments,
    METHOD: tl.constexpr,
    MASTERS: tl.constexpr,
    MOMENTUM: tl.constexpr,
    ELEMENTS: tl.constexpr,
    WEIGHT: tl.constexpr,
    INDEX: tl.constexpr,
    FIELDS: tl.constexpr,
    FACTORS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Steps BLOCK values of one weight: masters and state as streams, the weight's entries by
    index, which ascends, so that neighbours share sectors.

    Numerics: float32, operation by operation; division and root round to nearest. Traffic: 28 B of
    streams and the index for a value, and what of the weight its sectors are.
    """
    block = tl.program_id(0).to(tl.int64)
    number = tensor_of(table_ptr, block, segments, FIELDS, STEPS)
    row = table_ptr + number * FIELDS
    first = (block - tl.load(row)) * BLOCK
    weight_ptr = tl.load(row + 1).to(tl.pointer_type(WEIGHT))
    grad_ptr = tl.load(row + 5).to(tl.pointer_type(tl.float32))
    index_ptr = tl.load(row + 6).to(tl.pointer_type(INDEX))
    offset, there = offsets_of_values(
        index_ptr,
        first,
        tl.load(row + 7),
        tl.load(row + 8),
        tl.load(row + 9),
        tl.load(row + 10),
        ELEMENTS,
        BLOCK,
    )
    value_at = first + tl.arange(0, BLOCK)
    f = factors_ptr + number * FACTORS
    g = tl.load(f) * tl.load(grad_ptr + value_at, mask=there, other=0.0)
    master_ptr = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    m_ptr = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    if MASTERS:
        w = tl.load(master_ptr + value_at, mask=there, other=0.0)
    else:
        w = tl.load(weight_ptr + offset, mask=there, other=0.0).to(tl.float32)

    if METHOD == "masked_adamw_":
        v_ptr = tl.load(row + 4).to(tl.pointer_type(tl.float32))
        keep, rate, take1 = tl.load(f + 1), tl.load(f + 2), tl.load(f + 3)
        beta2, take2, root, eps = tl.load(f + 4), tl.load(f + 5), tl.load(f + 6), tl.load(f + 7)
        m = tl.load(m_ptr + value_at, mask=there, other=0.0)
        v = tl.load(v_ptr + value_at, mask=there, other=0.0)
        m += take1 * (g - m)
        v = beta2 * v + take2 * g * g
        w = w * keep - rate * tl.div_rn(m, tl.sqrt_rn(v) * root + eps)
        tl.store(m_ptr + value_at, m, mask=there)
        tl.store(v_ptr + value_at, v, mask=there)
    elif METHOD == "masked_lion_":
        keep, rate, take1, take2 = tl.load(f + 1), tl.load(f + 2), tl.load(f + 3), tl.load(f + 4)
        m = tl.load(m_ptr + value_at, mask=there, other=0.0)
        direction = m + take1 * (g - m)
        m += take2 * (g - m)
        sign = tl.where(direction > 0, 1.0, tl.where(direction < 0, -1.0, direction))
        w = w * keep - rate * sign
        tl.store(m_ptr + value_at, m, mask=there)
    else:
        decay, rate = tl.load(f + 1), tl.load(f + 2)
        g += decay * w
        if MOMENTUM:
            momentum, take, ahead = tl.load(f + 3), tl.load(f + 4), tl.load(f + 5)
            m = tl.load(m_ptr + value_at, mask=there, other=0.0)
            # The first step's buffer is the gradient, whatever stood there.
            m = tl.where(tl.load(f + 6) != 0, g, momentum * m + take * g)
            tl.store(m_ptr + value_at, m, mask=there)
            g = tl.where(tl.load(f + 7) != 0, g + ahead * m, m)
        w = w - rate * g

    if MASTERS:
        tl.store(master_ptr + value_at, w, mask=there)
    if rng_ptr is not None:
        rounded = _round_stochastic(w, _random_bits(rng_ptr, tl.load(row + 11) + value_at), WEIGHT)
    else:
        rounded = w.to(WEIGHT)
    tl.store(weight_ptr + offset, rounded, mask=there)


# -- launchers -------------------------------------------------------------------------------------


def _factors(op: str, hypers: torch.Tensor) -> torch.Tensor:
    """What the kernel reads of every weight's hyperparameters, float32."""
    lr, decay, step, sign, a, b, c = hypers.unbind(1)
    zero = torch.zeros_like(lr)
    if op == "masked_adamw_":
        rest = (1 - lr * decay, lr / (1 - a**step), 1 - a, b, 1 - b, (1 - b**step) ** -0.5, c)
    elif op == "masked_lion_":
        rest = (1 - lr * decay, lr, 1 - a, 1 - b, zero, zero, zero)
    else:
        rest = (decay, lr, a, 1 - b, a, (step <= 1).to(lr.dtype), c)
    return torch.stack((sign, *rest), dim=1).float()


def _launcher(op: str, states: int) -> Callable[..., None]:
    def launch(weights: Sequence[torch.Tensor], values: Sequence[torch.Tensor], *rest: Any) -> None:
        own, (grads, index, rows, columns, hypers, rng) = rest[:states], rest[states:]
        grads = [one.contiguous() for one in grads]
        index = [one.contiguous() for one in index]
        device = weights[0].device
        for i, weight in enumerate(weights):
            expect_index(op, index[i], rows[i], columns[i], *matrix_of(weight))
        kinds: dict[tuple[Any, ...], list[int]] = {}
        before, first_values = 0, []
        for i, weight in enumerate(weights):
            first_values.append(before)
            before += grads[i].numel()
            elements, masters = rows[i] * columns[i] == 1, values[i].numel() > 0
            momentum = own[0][i].numel() > 0
            kind = weight.dtype, index[i].dtype, elements, masters, momentum
            if grads[i].numel():
                kinds.setdefault(kind, []).append(i)
        factors = _factors(op, hypers).to(device)
        rng = None if rng is None else rng.to(device).contiguous()
        for (dtype, index_dtype, elements, masters, momentum), members in kinds.items():
            blocks, table = 0, []
            for i in members:
                pointers = [weights[i], values[i], own[0][i], own[-1][i], grads[i], index[i]]
                stride, values_here = matrix_of(weights[i])[1], grads[i].numel()
                addresses = (one.data_ptr() for one in pointers)
                sizes = (values_here, rows[i], columns[i], stride, first_values[i])
                table.append((blocks, *addresses, *sizes))
                blocks += triton.cdiv(values_here, _BLOCK)
            whole = len(members) == len(weights)
            with torch.cuda.device_of(weights[0]):
                _masked_step_kernel[(blocks,)](
                    torch.tensor(table, dtype=torch.int64, device=device),
                    factors if whole else factors[members],
                    rng,
                    len(members),
                    METHOD=op,
                    MASTERS=masters,
                    MOMENTUM=momentum,
                    ELEMENTS=elements,
                    WEIGHT=DOT_TYPES[dtype],
                    INDEX=_INDEX_TYPES[index_dtype],
                    FIELDS=_FIELDS,
                    FACTORS=_FACTORS,
                    STEPS=search_steps(len(members)),
                    BLOCK=_BLOCK,
                    num_warps=4,
                    num_stages=1,
                    **EXACT_OPTIONS,
                )

    return launch


for _op, _states in (("masked_adamw_", 2), ("masked_sgd_", 1), ("masked_lion_", 1)):
    implement(_op, "triton", unsupported=unsupported)(_launcher(_op, _states))
