"""Which blocks a tile of query rows reads, in which order, and which row chose which of them."""

from __future__ import annotations

import triton
import triton.language as tl

ABSENT = tl.constexpr(2**31 - 1)


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
def union_of_rows(ids, ROWS: tl.constexpr, TOPK_PAD: tl.constexpr, UNION: tl.constexpr):
    """The present ids of all rows, ascending and each once.

    Returns
    -------
    blocks int32 [UNION], zeros at the end; bits int32 [UNION], bit r set if row r chose the block;
    count of blocks
    """
    size: tl.constexpr = ROWS * TOPK_PAD
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
    return blocks, bits, tl.sum(first.to(tl.int32), axis=0)


@triton.jit
def sum_keys(values, KEYS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum of a [KEYS, COLUMNS] tile along its keys, in one order for every layout of threads.

    `tl.sum` adds in the order of the tile's layout, which depends on its shape and so on how many
    rows are computed together. A sum of two has no order.
    """
    # Within a thread, then within a warp, then between warps, as tensor cores leave their results.
    values = tl.sum(tl.reshape(values, [KEYS // 16, 2, 8, COLUMNS]), axis=1)
    values = tl.sum(tl.reshape(values, [KEYS // 16, 2, 4, COLUMNS]), axis=1)
    values = tl.sum(tl.reshape(values, [KEYS // 16, 2, 2, COLUMNS]), axis=1)
    values = tl.sum(tl.reshape(values, [KEYS // 16, 2, COLUMNS]), axis=1)
    for level in tl.static_range(5, 16):
        if (KEYS >> level) > 0:
            values = tl.sum(tl.reshape(values, [2, KEYS >> level, COLUMNS]), axis=0)
    return tl.reshape(values, [COLUMNS])
