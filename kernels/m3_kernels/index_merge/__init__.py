"""The op `index_merge`; its contract is in `interface.py`, its maths in README.md."""

from m3_kernels.index_merge.call import IndexMerge
from m3_kernels.index_merge.interface import INDEX_MERGE, index_merge

__all__ = ["INDEX_MERGE", "IndexMerge", "index_merge"]
