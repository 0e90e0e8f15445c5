"""Triton kernels and their launchers, imported as ``pyfastft.triton_kernels``."""

if __name__ == "triton_kernels":
    raise ImportError(
        "this folder is pyfastft.triton_kernels; the name triton_kernels belongs to Triton's own "
        "package. Install pyfastft (pip install -e .) and import pyfastft.triton_kernels"
    )
