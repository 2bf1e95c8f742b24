"""The op `sparse_attention`; its contract is in `interface.py`, its maths in README.md."""

from m3_kernels.sparse_attention.interface import sparse_attention

__all__ = ["sparse_attention"]
