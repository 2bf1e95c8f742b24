"""The op `dense_attention`; its contract is in `interface.py`, its maths in README.md."""

from m3_kernels.dense_attention.call import DenseAttention
from m3_kernels.dense_attention.interface import DENSE_ATTENTION, dense_attention

__all__ = ["DENSE_ATTENTION", "DenseAttention", "dense_attention"]
