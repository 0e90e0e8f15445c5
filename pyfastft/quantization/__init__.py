"""Weights in 4 bits: the canonical tensor, the quantizers and what they do to a model."""

from pyfastft.quantization.tensor import QTensor4

__all__ = ["QTensor4", "dequantize", "quantize", "quantize_weight"]


def __getattr__(name: str) -> object:
    """The rest of the package needs the layers, which need the tensor above."""
    if name in ("dequantize", "quantize"):
        from pyfastft.quantization import model

        return getattr(model, name)
    if name == "quantize_weight":
        from pyfastft.quantization.quantizers import quantize_weight

        return quantize_weight
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
