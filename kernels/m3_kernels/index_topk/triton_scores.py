"""Scores of blocks: what decode and prefill share.

Lines are pairs of a query row and an index head. Keys lie along the first axis of a tile of dot
products where lines are few (KEY_AXIS 0: tensor cores want 64 rows or more on one side, and a
decode step has a handful of queries), along the second where they are many (1).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from m3_kernels.triton_shared import load_slots, pick

# Page ids are loaded this many at a time and taken out of registers one by one: an address that
# waits for a load within the loop keeps Triton from pipelining the keys. One id for each lane of a
# warp makes taking one out a matter of shuffles.
PAGES = tl.constexpr(32)


class Keys(NamedTuple):
    """The pool of index keys.

    Attributes
    ----------
    pages, stride_page, stride_slot : pointer to the pool, strides in numbers
    tiles : descriptor of the pool with tiles [1, KEYS, DIM_PAD], where there is one
    scales, scale_stride : one scale for each key of a page, where there are any
    """

    pages: Any
    stride_page: Any
    stride_slot: Any
    tiles: Any
    scales: Any
    scale_stride: Any


@triton.jit
def load_queries(
    index_q,
    rows,
    heads,
    exists,
    stride_row,
    stride_head,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Queries of the lines, [LINES, DIM_PAD]; zeros for lines that do not exist."""
    dim = tl.arange(0, DIM_PAD)
    starts = index_q + rows.to(tl.int64) * stride_row + heads * stride_head
    inside = exists[:, None] & (dim < DIM)[None, :]
    return tl.load(starts[:, None] + dim[None, :], mask=inside, other=0.0).to(DTYPE)


@triton.jit
def block_maxima(
    queries,
    keys,
    page,
    block,
    positions,
    MASKED: tl.constexpr,
    KEY_AXIS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
):
    """The best score of a block for each line, fp32; MASKED hides keys past `positions`.

    `queries` is [DIM_PAD, LINES] with KEY_AXIS 0, else [LINES, DIM_PAD]. NaN counts as -inf.
    """
    DIM_PAD: tl.constexpr = queries.shape[KEY_AXIS]
    best = tl.full([queries.shape[1 - KEY_AXIS]], float("-inf"), tl.float32)
    for tile in tl.static_range(0, (PAGE_SIZE + KEYS - 1) // KEYS):
        first = tile * KEYS
        slot = first + tl.arange(0, KEYS)
        if USE_DESCRIPTORS:
            loaded = tl.reshape(keys.tiles.load([page, first, 0]), [KEYS, DIM_PAD])
        else:
            loaded = load_slots(
                keys.pages,
                page,
                first,
                keys.stride_page,
                keys.stride_slot,
                PAGE_SIZE,
                DIM,
                DIM_PAD,
                KEYS,
            )
        loaded = loaded.to(queries.dtype)
        if KEY_AXIS == 0:
            dots = tl.dot(loaded, queries, input_precision="ieee")
        else:
            dots = tl.dot(queries, tl.trans(loaded), input_precision="ieee")
        in_page = slot < PAGE_SIZE
        if HAS_SCALES:
            places = keys.scales + page.to(tl.int64) * keys.scale_stride + slot
            scales = tl.load(places, mask=in_page, other=0.0).to(tl.float32)
            dots *= tl.expand_dims(scales, 1 - KEY_AXIS)
        if MASKED:
            position = tl.expand_dims(block * PAGE_SIZE + slot, 1 - KEY_AXIS)
            visible = position <= tl.expand_dims(positions, KEY_AXIS)
            visible = visible & tl.expand_dims(in_page, 1 - KEY_AXIS)
            dots = tl.where(visible, dots, float("-inf"))
        elif PAGE_SIZE % KEYS != 0:
            dots = tl.where(tl.expand_dims(in_page, 1 - KEY_AXIS), dots, float("-inf"))
        # both pass NaN over if there is a number, and there is one in `best`
        best = tl.maximum(best, tl.max(dots, axis=KEY_AXIS))
    return best


@triton.jit
def score_blocks(
    queries,
    keys,
    page_table,
    first,
    last,
    whole,
    positions,
    places,
    exists,
    KEY_AXIS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
):
    """Score the blocks `first:last` of a request.

    Parameters
    ----------
    page_table : the request's line of it
    whole : blocks before this one are seen to their end by every line
    positions, exists : of each line
    places : pointer to the score of block 0 for each line
    """
    for start in tl.range(first, last, PAGES):
        listed = start + tl.arange(0, PAGES)
        pages = tl.load(page_table + listed, mask=listed < last, other=0)
        until = tl.minimum(last - start, PAGES)
        unmasked = tl.minimum(tl.maximum(whole - start, 0), until)
        for place in tl.range(0, unmasked):
            best = block_maxima(
                queries,
                keys,
                pick(pages, place, PAGES),
                start + place,
                positions,
                False,
                KEY_AXIS,
                DIM,
                PAGE_SIZE,
                KEYS,
                HAS_SCALES,
                USE_DESCRIPTORS,
            )
            tl.store(places + start + place, best, mask=exists)
        for place in tl.range(unmasked, until, num_stages=1):
            best = block_maxima(
                queries,
                keys,
                pick(pages, place, PAGES),
                start + place,
                positions,
                True,
                KEY_AXIS,
                DIM,
                PAGE_SIZE,
                KEYS,
                HAS_SCALES,
                USE_DESCRIPTORS,
            )
            tl.store(places + start + place, best, mask=exists)
