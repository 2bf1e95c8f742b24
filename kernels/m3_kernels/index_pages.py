"""Pages of index keys with scales in one array: the keys of a page, then their scales.

A host that knows nothing of scales allocates vectors of `channels` numbers. Keys stay at addresses
which descriptors and wide loads want; behind each other, key and scale would not.

int8 keys are one plane of bytes. Keys of 16-bit fixed point, which a host allocates as int16, are
two: the high bytes of a page's keys, their low bytes, their scales (docs/index-planes.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SCALE_DTYPE = torch.float16
# How a host is told, and its pages tell, that index keys are two planes of bytes.
PLANES_DTYPE = torch.int16
# The range of fp32, so that no key is too large or too small for its scale.
PLANES_SCALE_DTYPE = torch.bfloat16


class IndexViews(NamedTuple):
    """What lies in a host's pages of index keys.

    Attributes
    ----------
    keys : [P, page_size, index_dim]; of two planes the high one, int8
    scales : [P, page_size], None where keys have none
    low : the low plane, int8 as keys; None where there is one plane
    """

    keys: Tensor
    scales: Tensor | None = None
    low: Tensor | None = None


def channels(index_dim: int, dtype: torch.dtype) -> int:
    """Numbers of `dtype` that a host allocates for an index key and its scale, if it has one."""
    if dtype == torch.int8:
        return bytes_per_token(index_dim)
    return index_dim + (1 if dtype == PLANES_DTYPE else 0)


def views_of(memory: Tensor) -> IndexViews:
    """A host's pages [P, page_size, `channels`] as the kernels take them; the dtype says how.

    Raises
    ------
    ValueError : keys have scales, and the bytes of a page are not beside each other.
    """
    if memory.dtype == torch.int8:
        return IndexViews(*split_pages(memory))
    if memory.dtype == PLANES_DTYPE:
        return split_planes(memory)
    return IndexViews(memory)


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
    pages = _whole_pages(memory, torch.int8, "int8 index keys")
    page_size, index_dim = memory.shape[1], memory.shape[2] - SCALE_DTYPE.itemsize
    keys, scales = pages.split([page_size * index_dim, page_size * SCALE_DTYPE.itemsize], dim=1)
    return keys.unflatten(1, (page_size, index_dim)), scales.view(SCALE_DTYPE)


def split_planes(memory: Tensor) -> IndexViews:
    """High plane, scales and low plane as views of a host's pages.

    Parameters
    ----------
    memory : `PLANES_DTYPE` [P, page_size, index_dim + 1], the numbers of a page beside each other

    Raises
    ------
    TypeError : memory is not of `PLANES_DTYPE`.
    ValueError : the numbers of a page are not beside each other.
    """
    pages = _whole_pages(memory, PLANES_DTYPE, "index keys in two planes")
    page_size, index_dim = memory.shape[1], memory.shape[2] - 1
    plane, size = page_size * index_dim, page_size * PLANES_SCALE_DTYPE.itemsize
    high, low, scales = pages.view(torch.int8).split([plane, plane, size], dim=1)
    shape = (page_size, index_dim)
    return IndexViews(
        high.unflatten(1, shape), scales.view(PLANES_SCALE_DTYPE), low.unflatten(1, shape)
    )


def _whole_pages(memory: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """[P, page_size, width] as [P, page_size * width], each page in one piece."""
    if memory.dtype != dtype:
        raise TypeError(f"pages of {what} must be {dtype}; got {memory.dtype}")
    num_pages, page_size, width = memory.shape
    if memory.stride()[1:] != (width, 1):
        raise ValueError(
            f"the bytes of a page must be beside each other, strides [*, {width}, 1]; "
            f"got {list(memory.stride())}"
        )
    return memory.as_strided((num_pages, page_size * width), (memory.stride(0), 1))
