"""The op `index_topk`; its contract is in `interface.py`, its maths in README.md."""

from m3_kernels.index_topk.call import IndexTopk
from m3_kernels.index_topk.interface import INDEX_TOPK, index_topk

__all__ = ["INDEX_TOPK", "IndexTopk", "index_topk"]
