"""A tile of queries walks the union of its rows' blocks: what decode and prefill share.

A tile's lines are pairs of a query row and a head of the group. Keys lie along the first axis of
its logits where lines are few (KEY_AXIS 0: tensor cores want one tall side), and along the second
where they are many (KEY_AXIS 1). Per-line numbers, peaks and totals, are vectors in both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from m3_kernels.sparse_attention.triton_softmax import attend
from m3_kernels.triton_shared import load_slots, pick


class Pages(NamedTuple):
    """Keys or values of one KV head.

    Attributes
    ----------
    start : pointer to the head in page 0
    tiles : descriptor of the whole pool with tiles [1, 1, KEYS, HEAD_DIM], where there is one
    head : the KV head
    stride_page, stride_slot : in numbers
    """

    start: Any
    tiles: Any
    head: Any
    stride_page: Any
    stride_slot: Any


class Lines(NamedTuple):
    """Row of the tile and position in the sequence of every line; int32."""

    row: Any
    position: Any


@triton.jit
def factor_of_head(scale, head, stride, GIVEN: tl.constexpr):
    """What stored numbers of a head are multiplied with; 1 without scales."""
    factor = 1.0
    if GIVEN:
        factor = tl.load(scale + head * stride)
    return factor


@triton.jit
def load_queries(
    q,
    rows,
    heads,
    exists,
    stride_row,
    stride_head,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Queries of the lines, [LINES, HEAD_PAD]; zeros for lines that do not exist."""
    dim = tl.arange(0, HEAD_PAD)
    starts = q + rows.to(tl.int64) * stride_row + heads * stride_head
    inside = exists[:, None] & (dim < HEAD_DIM)[None, :]
    return tl.load(starts[:, None] + dim[None, :], mask=inside, other=0.0).to(DTYPE)


@triton.jit
def pages_of(pool, tiles, head, stride_page, stride_head, stride_slot):
    """The part of a pool that belongs to a head."""
    start = pool + head.to(tl.int64) * stride_head
    return Pages(start, tiles, head, stride_page, stride_slot)


@triton.jit
def load_tile(
    pages,
    page,
    first,
    KEYS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
):
    """Slots of a page from `first` on, [KEYS, HEAD_PAD]; zeros past its edges."""
    if USE_DESCRIPTORS:
        tile = pages.tiles.load([page, pages.head, first, 0]).reshape(KEYS, HEAD_PAD)
    else:
        tile = load_slots(
            pages.start,
            page,
            first,
            pages.stride_page,
            pages.stride_slot,
            PAGE_SIZE,
            HEAD_DIM,
            HEAD_PAD,
            KEYS,
        )
    return tile


@triton.jit
def as_values(v, query):
    """Stored values in the dtype of their products.

    fp16 holds those of 8 bits, and the weights, which are at most 1, better than bf16 does; chips
    convert to it in one step.
    """
    if v.dtype.primitive_bitwidth == 8 and query.dtype == tl.bfloat16:
        values = v.to(tl.float16)
    else:
        values = v.to(query.dtype)
    return values


@triton.jit
def load_readable(pages, page, slot, readable, HEAD_DIM: tl.constexpr, HEAD_PAD: tl.constexpr):
    """The given slots of a page, [KEYS, HEAD_PAD]; zeros for those which are not readable."""
    dim = tl.arange(0, HEAD_PAD)
    rows = pages.start + page * pages.stride_page + slot.to(tl.int64) * pages.stride_slot
    inside = readable[:, None] & (dim < HEAD_DIM)[None, :]
    return tl.load(rows[:, None] + dim[None, :], mask=inside, other=0.0)


@triton.jit
def attend_whole(
    query,
    k_pages,
    v_pages,
    union,
    end_step,
    lines,
    scale,
    sums,
    KEY_AXIS: tl.constexpr,
    KEYS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
):
    """Attend to the first steps of the union, whose blocks every row that chose them sees whole."""
    TILES: tl.constexpr = (PAGE_SIZE + KEYS - 1) // KEYS
    UNION: tl.constexpr = union.blocks.shape[0]
    HEAD_PAD: tl.constexpr = query.shape[KEY_AXIS]
    key = tl.arange(0, KEYS)
    for step in tl.range(0, end_step):
        place = step // TILES
        first = (step % TILES) * KEYS
        page = pick(union.pages, place, UNION)
        members = pick(union.bits, place, UNION)
        k = load_tile(k_pages, page, first, KEYS, PAGE_SIZE, HEAD_DIM, HEAD_PAD, USE_DESCRIPTORS)
        v = load_tile(v_pages, page, first, KEYS, PAGE_SIZE, HEAD_DIM, HEAD_PAD, USE_DESCRIPTORS)
        member = (members >> lines.row) & 1 > 0
        in_page = tl.expand_dims(first + key < PAGE_SIZE, 1 - KEY_AXIS)
        visible = in_page & tl.expand_dims(member, KEY_AXIS)
        sums = attend(query, k.to(query.dtype), as_values(v, query), visible, scale, sums, KEY_AXIS)
    return sums


@triton.jit
def attend_masked(
    query,
    k_pages,
    v_pages,
    union,
    first_step,
    end_step,
    turn,
    newest,
    lines,
    scale,
    sums,
    KEY_AXIS: tl.constexpr,
    KEYS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attend to steps of the union where not every row sees every key.

    Parameters
    ----------
    turn : bit r is set for the rows of the tile that are wanted
    newest : position of the last key that any of them sees; later ones are not read
    """
    TILES: tl.constexpr = (PAGE_SIZE + KEYS - 1) // KEYS
    UNION: tl.constexpr = union.blocks.shape[0]
    HEAD_PAD: tl.constexpr = query.shape[KEY_AXIS]
    key = tl.arange(0, KEYS)
    for step in tl.range(first_step, end_step, num_stages=STAGES):
        place = step // TILES
        slot = (step % TILES) * KEYS + key
        page = pick(union.pages, place, UNION).to(tl.int64)
        members = pick(union.bits, place, UNION) & turn
        position = pick(union.blocks, place, UNION) * PAGE_SIZE + slot
        readable = (slot < PAGE_SIZE) & (position <= tl.where(members > 0, newest, -1))
        k = load_readable(k_pages, page, slot, readable, HEAD_DIM, HEAD_PAD)
        v = load_readable(v_pages, page, slot, readable, HEAD_DIM, HEAD_PAD)
        member = (members >> lines.row) & 1 > 0
        seen = tl.expand_dims(position, 1 - KEY_AXIS) <= tl.expand_dims(lines.position, KEY_AXIS)
        visible = tl.expand_dims(member, KEY_AXIS) & seen
        visible = visible & tl.expand_dims(readable, 1 - KEY_AXIS)
        sums = attend(query, k.to(query.dtype), as_values(v, query), visible, scale, sums, KEY_AXIS)
    return sums
