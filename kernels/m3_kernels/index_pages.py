"""Pages of int8 index keys in one array: the keys of a page, then their scales.

A host that knows nothing of scales allocates vectors of `bytes_per_token` bytes. Keys stay at
addresses which descriptors and wide loads want; behind each other, key and scale would not.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_DTYPE = torch.float16


def bytes_per_token(index_dim: int) -> int:
    """Bytes of one index key in int8 and its scale."""
    return index_dim + SCALE_DTYPE.itemsize


def split_pages(memory: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and scales as views of a host's pages.

    Parameters
    ----------
    memory : int8 [P, page_size, bytes_per_token], the bytes of a page beside each other

    Returns
    -------
    int8 [P, page_size, index_dim] and `SCALE_DTYPE` [P, page_size]

    Raises
    ------
    TypeError : memory is not int8.
    ValueError : the bytes of a page are not beside each other.
    """
    if memory.dtype != torch.int8:
        raise TypeError(f"pages of int8 index keys must be {torch.int8}; got {memory.dtype}")
    num_pages, page_size, width = memory.shape
    if memory.stride()[1:] != (width, 1):
        raise ValueError(
            f"the bytes of a page must be beside each other, strides [*, {width}, 1]; "
            f"got {list(memory.stride())}"
        )
    index_dim = width - SCALE_DTYPE.itemsize
    pages = memory.as_strided((num_pages, page_size * width), (memory.stride(0), 1))
    keys, scales = pages.split([page_size * index_dim, page_size * SCALE_DTYPE.itemsize], dim=1)
    return keys.unflatten(1, (page_size, index_dim)), scales.view(SCALE_DTYPE)
