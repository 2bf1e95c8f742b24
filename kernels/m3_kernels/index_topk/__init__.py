"""The op `index_topk`; its contract is in `interface.py`, its maths in README.md."""

from m3_kernels.index_topk.call import IndexTopk
from m3_kernels.index_topk.interface import (
    INDEX_CANDIDATES,
    INDEX_TOPK,
    index_candidates,
    index_topk,
)
from m3_kernels.index_topk.share import BlockShare, share_of_rank

__all__ = [
    "INDEX_CANDIDATES",
    "INDEX_TOPK",
    "BlockShare",
    "IndexTopk",
    "index_candidates",
    "index_topk",
    "share_of_rank",
]
