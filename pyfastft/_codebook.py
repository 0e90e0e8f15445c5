"""What the 4-bit codes 0..15 stand for; mirrored by ``csrc/include/fastft/codebook.h``.

``int4``: the code itself, from which a zero-point is subtracted: 8 where none is given. ``nf4`` and
``fp4``: the tables of bitsandbytes, whose largest magnitude is 1; they have no zero-point.

Source: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", appendix E; the
values are those that bitsandbytes computes in float32.
"""

from __future__ import annotations

CODEBOOKS = ("int4", "nf4", "fp4")
CODES = 16
# The zero-point of int4 where none is given.
IMPLIED_ZERO = 8
# What activations can be rounded to beside int4.
ACTIVATIONS = ("int8",)

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = (*(x / 12 for x in _FP4_TWELFTHS), *(0.0 - x / 12 for x in _FP4_TWELFTHS))

TABLES = {"int4": tuple(map(float, range(CODES))), "nf4": NF4, "fp4": FP4}
