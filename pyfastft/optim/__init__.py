"""Optimizers with the contract of ``torch.optim``."""

from pyfastft.optim.masked import MaskedAdamW, MaskedLion, MaskedSGD

__all__ = ["MaskedAdamW", "MaskedLion", "MaskedSGD"]
