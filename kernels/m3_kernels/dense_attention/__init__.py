"""The op `dense_attention`; its contract is in `interface.py`, its maths in README.md."""

from m3_kernels.dense_attention.interface import dense_attention

__all__ = ["dense_attention"]
