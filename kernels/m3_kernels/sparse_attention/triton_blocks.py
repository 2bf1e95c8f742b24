"""Which blocks a tile of query rows reads, in which order, and which row chose which of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

ABSENT = tl.constexpr(2**31 - 1)


class Union(NamedTuple):
    """Blocks which the rows of a tile chose, ascending.

    Attributes
    ----------
    blocks, pages : int32 [UNION], zeros at the end
    bits : int32 [UNION], bit r is set if row r chose the block
    count : blocks, int32
    """

    blocks: Any
    pages: Any
    bits: Any
    count: Any


@triton.jit
def load_chosen(
    block_ids,
    rows,
    row_exists,
    positions,
    stride_row,
    PAGE_SIZE: tl.constexpr,
    TOPK: tl.constexpr,
    TOPK_PAD: tl.constexpr,
):
    """Ids int32 [ROWS, TOPK_PAD] of each row; ABSENT for repeats and what names no visible block.

    An id compares with the others of its row, so their order never matters.
    """
    place = tl.arange(0, TOPK_PAD)
    ids = tl.load(
        block_ids + rows[:, None].to(tl.int64) * stride_row + place[None, :],
        mask=row_exists[:, None] & (place < TOPK)[None, :],
        other=-1,
    )
    # Division truncates towards zero; a row before position 0 sees nothing.
    own = tl.where(positions < 0, -1, positions // PAGE_SIZE)
    ids = tl.where((ids >= 0) & (ids <= own[:, None]), ids, ABSENT)
    same = ids[:, :, None] == ids[:, None, :]
    earlier = place[None, :] < place[:, None]
    repeats = tl.sum((same & earlier[None, :, :]).to(tl.int32), axis=2)
    return tl.where(repeats > 0, ABSENT, ids)


@triton.jit
def rank_in_row(ids):
    """Rank int32 [ROWS, TOPK_PAD] of every present id among the present ids of its row."""
    smaller = ids[:, None, :] < ids[:, :, None]
    return tl.sum(smaller.to(tl.int32), axis=2)


@triton.jit
def union_of_rows(ids, page_table, UNION: tl.constexpr):
    """The present ids [ROWS, TOPK_PAD] of all rows, each once; `page_table` is the request's."""
    TOPK_PAD: tl.constexpr = ids.shape[1]
    size: tl.constexpr = ids.shape[0] * TOPK_PAD
    flat = tl.reshape(ids, [size])
    place = tl.arange(0, size)
    present = flat != ABSENT
    same_before = (flat[:, None] == flat[None, :]) & (place[None, :] < place[:, None])
    first = present & (tl.sum(same_before.to(tl.int32), axis=1) == 0)
    smaller = (flat[None, :] < flat[:, None]) & first[None, :]
    rank = tl.sum(smaller.to(tl.int32), axis=1)
    slot = tl.arange(0, UNION)
    here = (rank[:, None] == slot[None, :]) & present[:, None]
    blocks = tl.sum(tl.where(here & first[:, None], flat[:, None], 0), axis=0)
    # A row holds an id once, so the sum of its bits is their union.
    bits = tl.sum(tl.where(here, (1 << (place // TOPK_PAD))[:, None], 0), axis=0)
    count = tl.sum(first.to(tl.int32), axis=0)
    pages = tl.load(page_table + blocks, mask=slot < count, other=0)
    return Union(blocks, pages, bits, count)


@triton.jit
def whole_blocks(union, positions_start, PAGE_SIZE: tl.constexpr):
    """How many blocks of the union end before or with the position of a tile's first row."""
    slot = tl.arange(0, union.blocks.shape[0])
    ends = (union.blocks + 1) * PAGE_SIZE
    whole = (slot < union.count) & (ends <= positions_start + 1)
    return tl.sum(whole.to(tl.int32), axis=0)
