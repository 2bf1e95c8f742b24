"""The op `mxfp8_linear`; its contract is in `interface.py`, its maths in README.md."""

from m3_kernels.mxfp8_linear.interface import compile_mxfp8_linear, mxfp8_linear

__all__ = ["compile_mxfp8_linear", "mxfp8_linear"]
