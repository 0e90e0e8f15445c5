"""Linear layers whose weights have 4 bits."""

from __future__ import annotations

import torch

from pyfastft import ops
from pyfastft.functional._arguments import as_scaling, rng_for


def int4_dequantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    *,
    zero: torch.Tensor | None = None,
    perm: torch.Tensor | None = None,
    k: int | None = None,
    group_size: int,
    codebook: str = "int4",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    r"""The matrix that a 4-bit weight stands for.

    .. math:: W_{n,\mathrm{perm}(j)} = s_{n, \lfloor j/g \rfloor}
        \cdot (c_{n,j} - z_{n, \lfloor j/g \rfloor})

    Args:
        codes: c of shape (N, ceil(K / 2)), uint8: two codes in a byte, that of even j in the low
            nibble; where K is odd the last high nibble is not read.
        scale: s of shape (N, G), float32 or bfloat16, G = ceil(K / group_size): the last group may
            be short, and a group of K or more is one scale per row.
        zero: z of shape (N, G): uint8, or floats of the scale's dtype. Absent, it is 8. The
            codebooks nf4 and fp4 have none.
        perm: int32 of shape (K,), a permutation: the input feature of every position of the codes
            (act-order). Absent, they are in order.
        k: K; absent, twice the columns of ``codes``.
        group_size: g, how many codes of a row share a scale.
        codebook: ``"int4"``, or ``"nf4"`` or ``"fp4"``: bitsandbytes' table[c] stands for c - z.
        dtype: of W.

    Returns:
        W of shape (N, K), computed in float32 and rounded once; the same bits on every backend. It
        has no gradient.

    Raises:
        ValueError: a shape, device, size or codebook does not fit, or perm is no permutation.
        TypeError: a dtype does not fit, or an argument is not a dense tensor.
        NotImplementedError: no backend can run the arguments; lists every backend's reason.

    Reference:
        Frantar et al. 2023, "GPTQ", section 3; Dettmers et al. 2023, "QLoRA", section 3.
    """
    k = 2 * codes.shape[1] if k is None else k
    if zero is not None:
        zero = zero.detach()
    return ops.int4_dequantize(codes, scale.detach(), zero, perm, k, group_size, codebook, dtype)


def int4_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    *,
    zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    perm: torch.Tensor | None = None,
    packed: torch.Tensor | None = None,
    group_size: int,
    codebook: str = "int4",
) -> torch.Tensor:
    r"""A linear layer whose weight has 4 bits, read as they are.

    .. math:: y = x W^T + b, \quad W_{n,\mathrm{perm}(j)} = s_{n, \lfloor j/g \rfloor}
        \cdot (c_{n,j} - z_{n, \lfloor j/g \rfloor})

    Args:
        x: input of shape (..., K); float32, bfloat16, float16 or float64, any strides.
        codes, scale, zero, perm, group_size, codebook: the weight, see :func:`int4_dequantize`.
        bias: b of shape (N,), of x's dtype.
        packed: the codes in a backend's own order, where it has one; the CPU reads ``codes``.

    Returns:
        y of shape (..., N), of x's dtype, accumulated in float32 (float64 for float64). W is not
        rounded to x's dtype as a whole, nor held anywhere as one matrix.

    Raises:
        ValueError: a shape, device, size or codebook does not fit, or perm is no permutation.
        TypeError: a dtype does not fit, or an argument is not a dense tensor.
        NotImplementedError: no backend can run the arguments; lists every backend's reason.

    Note:
        Gradients go to x, the bias, the scale, and to zero where it is a float. Deterministic, and
        on CPU independent of the number of threads. The backward saves x only for the gradients of
        scale and zero; it cannot be differentiated again.

    Reference:
        Frantar et al. 2023, "GPTQ"; Dettmers et al. 2023, "QLoRA", equation 5 without adapters.
    """
    return ops.int4_linear(x, codes, scale, zero, bias, perm, packed, group_size, codebook)


def int4_lora_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    *,
    zero: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scaling: float | torch.Tensor = 1.0,
    p: float = 0.0,
    rng: torch.Tensor | None = None,
    perm: torch.Tensor | None = None,
    packed: torch.Tensor | None = None,
    group_size: int,
    codebook: str = "int4",
) -> torch.Tensor:
    r"""A low-rank update beside a 4-bit weight (QLoRA), in one op.

    .. math:: y = x W^T + b + s \cdot (\mathrm{dropout}_p(x) A^T) B^T

    Args:
        x: input of shape (..., K); float32, bfloat16, float16 or float64, any strides.
        codes, scale, zero, perm, group_size, codebook: W, see :func:`int4_dequantize`.
        lora_a, lora_b, bias, scaling, p, rng: as of :func:`lora_linear`.
        packed: the codes in a backend's own order, where it has one; the CPU reads ``codes``.

    Returns:
        y of shape (..., N), of x's dtype. Accumulated in float32 (float64 for float64).

    Raises:
        ValueError: a shape, device, size, probability or codebook does not fit, or perm is no
            permutation.
        TypeError: a dtype does not fit, or an argument is not a dense tensor.
        NotImplementedError: no backend can run the arguments; lists every backend's reason.

    Note:
        Gradients go to x, A, B, the bias and s, and where they are asked for to the scale and a
        float zero. Deterministic, and on CPU independent of the number of threads. It cannot be
        differentiated twice.

    Reference:
        Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", equation 5.
    """
    return ops.int4_lora_linear(
        *(x, codes, scale, zero, lora_a, lora_b, bias, as_scaling(scaling, x), p),
        *(rng_for(rng, p, x.device), perm, packed, group_size, codebook),
    )[0]
