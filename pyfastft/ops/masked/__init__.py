"""The masked family's contracts, one file per op. The derivation is in ``../masked.md``."""

from pyfastft.ops.masked.entries import masked_gather, masked_merge, masked_scatter_
from pyfastft.ops.masked.linear import MaskedLinearFunction
from pyfastft.ops.masked.select import select_topk
from pyfastft.ops.masked.step import masked_adamw_, masked_lion_, masked_sgd_
from pyfastft.ops.masked.weight_grad import masked_weight_grad

__all__ = [
    "MaskedLinearFunction",
    "masked_adamw_",
    "masked_gather",
    "masked_lion_",
    "masked_merge",
    "masked_scatter_",
    "masked_sgd_",
    "masked_weight_grad",
    "select_topk",
]
