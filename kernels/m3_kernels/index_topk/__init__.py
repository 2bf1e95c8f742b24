"""The op `index_topk`; its contract is in `interface.py`, its maths in README.md."""

from m3_kernels.index_topk.interface import index_topk

__all__ = ["index_topk"]
