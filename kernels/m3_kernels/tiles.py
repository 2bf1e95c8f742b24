"""Sizes and dtypes of the tiles that the Triton kernels of all ops work on; plain numbers."""

from __future__ import annotations

import torch

from m3_kernels.validation import LOW_PRECISION_DTYPES

# The least size of each side of a product on tensor cores.
MIN_TILE = 16


def power_of_two(size: int) -> int:
    """The least power of two that is not below `size`; 1 for 0."""
    return 1 << max(size - 1, 0).bit_length()


def keys_per_step(page_size: int, most: int) -> int:
    """Keys of one product: a power of two that covers the page, at most `most`.

    A step never leaves its page.
    """
    return min(max(power_of_two(page_size), MIN_TILE), most)


def dot_dtype(q: torch.dtype, stored: torch.dtype) -> torch.dtype:
    """The dtype of products of queries with what the cache holds.

    The queries' own for pages of the same dtype and for 8-bit ones, which it holds exactly; fp32 if
    two wide dtypes differ.
    """
    return q if stored in (q, *LOW_PRECISION_DTYPES) else torch.float32
