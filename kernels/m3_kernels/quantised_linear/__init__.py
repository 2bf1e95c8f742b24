"""The op `quantised_linear`; its contract is in `interface.py`, its maths in README.md."""

from m3_kernels.quantised_linear.interface import quantised_linear

__all__ = ["quantised_linear"]
