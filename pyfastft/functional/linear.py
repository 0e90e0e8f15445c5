"""One adapted linear layer, and its weight packed once."""

from __future__ import annotations

import torch

from pyfastft import ops
from pyfastft.functional._arguments import as_scaling, rng_for


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    scaling: float | torch.Tensor = 1.0,
    p: float = 0.0,
    rng: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    packed: torch.Tensor | None = None,
    packed_dx: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""A linear layer with a low-rank update, in one op.

    .. math:: y = x W^T + b + s \cdot ((\mathrm{dropout}_p(x) A^T) \odot g) B^T

    Args:
        x: input of shape (..., K); float32, bfloat16, float16 or float64, any strides.
        weight: W of shape (N, K), of x's dtype. None leaves the base product out, or leaves it to
            ``packed`` and ``packed_dx``.
        lora_a: A of shape (R, K), R >= 1; of x's dtype, or float32 beside a half-precision base.
        lora_b: B of shape (N, R), of A's dtype.
        bias: b of shape (N,), of x's dtype.
        scaling: s, usually alpha / R. A tensor of one float32 (float64 beside float64) gets a
            gradient and can change without recompilation.
        p: dropout probability in [0, 1], applied to the low-rank path's input only.
        rng: int64 tensor (seed, offset) that the mask is a function of, see
            :mod:`pyfastft._random`. Drawn from torch's generator where absent; not read, and no
            random state consumed, where p rounds to 0 of 65536.
        gate: g of shape (R,), or (..., R) with one gate per row; of A's dtype. Absent, it is 1.
        packed: W as ``pack_weight(weight)`` gives it, for a forward that need not pack it (CPU).
        packed_dx: the same for dX, of ``pack_weight(weight, transposed=True)``.

    Returns:
        y of shape (..., N), of x's dtype. Accumulated in float32 (float64 for float64).

    Raises:
        ValueError: a shape, device or probability does not fit.
        TypeError: a dtype does not fit, or an argument is not a dense tensor.
        NotImplementedError: no backend can run the arguments; lists every backend's reason.

    Note:
        Deterministic, and on CPU independent of the number of threads; another layout of the same
        values may be summed in another order. The backward saves x, dropout(x) A^T and 16 bytes;
        it cannot be differentiated again.

    Reference:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", equation 3.
    """
    return ops.lora_linear(
        x,
        weight,
        lora_a,
        lora_b,
        bias,
        as_scaling(scaling, x),
        p,
        rng_for(rng, p, x.device),
        gate,
        packed,
        packed_dx,
    )[0]


def pack_weight(weight: torch.Tensor, *, transposed: bool = False) -> torch.Tensor:
    r"""A frozen weight in the order in which the CPU's GEMM core reads it, packed once for

    .. math:: y = x W^T \quad \text{or, transposed,} \quad dX = dY\, W

    A call that is given it need not pack the weight again. It is neither portable nor to be
    stored: another level of the instruction set packs otherwise.

    Args:
        weight: W of shape (N, K), any strides; float32, bfloat16 or float16, on the CPU.
        transposed: pack for dX, the argument ``packed_dx``, instead of ``packed``.

    Returns:
        uint8 of one dimension, about the weight's own size; :func:`unpack_weight` is its inverse.

    Raises:
        TypeError, ValueError: the weight is of another dtype, layout, shape or device.
        NotImplementedError: the CPU extension is not there.

    Reference:
        Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication".
    """
    from pyfastft.native import _packing

    return _packing.pack(weight.detach(), transposed=transposed)


def unpack_weight(
    packed: torch.Tensor, n: int, k: int, dtype: torch.dtype, *, transposed: bool = False
) -> torch.Tensor:
    r"""The weight that :func:`pack_weight` was given, bit for bit:

    .. math:: \mathrm{unpack}(\mathrm{pack}(W)) = W

    Args:
        packed: what :func:`pack_weight` returned.
        n, k: N and K of the weight.
        dtype: the weight's dtype.
        transposed: as it was packed.

    Returns:
        W of shape (N, K).

    Raises:
        TypeError, ValueError: an argument is not of its kind.
        RuntimeError: it holds another weight than (N, K) of this dtype, is cut short, or was
            packed at another level of the instruction set.
        NotImplementedError: the CPU extension is not there.

    Reference:
        As of :func:`pack_weight`.
    """
    from pyfastft.native import _packing

    if transposed:
        return _packing.unpack(packed, k, n, dtype).T
    return _packing.unpack(packed, n, k, dtype)
