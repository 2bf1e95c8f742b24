"""Scores of the requests of decode kind: every index key is read once, for all rows and heads.

A program takes an equal range of the flat list of (request, block). A block belongs to one program,
so its maximum needs no second one, and which program that is changes no bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from m3_kernels.index_topk.triton_scores import PAGES, load_keys, load_scales
from m3_kernels.triton_shared import pick


@triton.jit
def block_maxima(
    queries,
    key_pages,
    key_tiles,
    key_scales,
    page,
    block,
    positions,
    stride_page,
    stride_slot,
    scale_stride,
    MASKED: tl.constexpr,
    N: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """The best score of a block for each column, fp32 [N]; MASKED hides keys past `positions`.

    The keys are the tall side of the product: tensor cores want 64 rows or more, and a decode step
    has a handful of queries. NaN counts as -inf.
    """
    best = tl.full([N], float("-inf"), tl.float32)
    for tile in tl.static_range(0, (PAGE_SIZE + KEYS - 1) // KEYS):
        keys = load_keys(
            key_pages,
            key_tiles,
            page,
            tile * KEYS,
            stride_page,
            stride_slot,
            PAGE_SIZE,
            DIM,
            DIM_PAD,
            KEYS,
            USE_DESCRIPTORS,
        )
        dots = tl.dot(keys.to(DOT_DTYPE), queries, input_precision="ieee")
        if HAS_SCALES:
            scales = load_scales(key_scales, page, tile * KEYS, scale_stride, PAGE_SIZE, KEYS)
            dots *= scales[:, None]
        dots = tl.where(dots == dots, dots, float("-inf"))
        slot = tile * KEYS + tl.arange(0, KEYS)
        if MASKED:
            visible = (block * PAGE_SIZE + slot)[:, None] <= positions[None, :]
            dots = tl.where(visible & (slot < PAGE_SIZE)[:, None], dots, float("-inf"))
        elif PAGE_SIZE % KEYS != 0:
            dots = tl.where((slot < PAGE_SIZE)[:, None], dots, float("-inf"))
        best = tl.maximum(best, tl.max(dots, axis=0))
    return best


@triton.jit(do_not_specialize=["score_stride"])
def index_decode_scores_kernel(
    index_q,
    key_pages,
    key_tiles,
    key_scales,
    page_table,
    cu_seqlens_q,
    seq_lens,
    cum_blocks,
    range_start,
    range_request,
    scores,
    q_stride_row,
    q_stride_head,
    key_stride_page,
    key_stride_slot,
    scale_stride,
    table_stride,
    score_stride,
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    N: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """Program c scores the blocks of range c of the plan.

    `scores` fp32 [R, SLOTS, HEADS, score_stride]; blocks that a row does not see score -inf.
    `key_tiles` is a descriptor of the pool with tiles [1, KEYS, DIM_PAD], read where
    USE_DESCRIPTORS is set.
    """
    program = tl.program_id(0)
    flat = tl.load(range_start + program)
    end = tl.load(range_start + program + 1)
    request = tl.load(range_request + program)
    column = tl.arange(0, N)
    column_row = column // HEADS
    dim = tl.arange(0, DIM_PAD)
    while flat < end:
        base = tl.load(cum_blocks + request)
        stop = tl.minimum(end, tl.load(cum_blocks + request + 1))
        if stop > flat:
            first_row = tl.load(cu_seqlens_q + request)
            query_len = tl.load(cu_seqlens_q + request + 1) - first_row
            first_position = tl.load(seq_lens + request) - query_len
            exists = column_row < query_len
            positions = first_position + column_row
            rows = (first_row + column_row).to(tl.int64)
            queries = tl.load(
                (index_q + rows * q_stride_row + (column % HEADS) * q_stride_head)[:, None]
                + dim[None, :],
                mask=exists[:, None] & (dim < DIM)[None, :],
                other=0.0,
            )
            queries = tl.trans(queries.to(DOT_DTYPE))
            table = page_table + request.to(tl.int64) * table_stride
            places = scores + (request.to(tl.int64) * (SLOTS * HEADS) + column) * score_stride
            # Blocks that the first row, and so every row, sees to their end.
            whole = tl.maximum(first_position + 1, 0) // PAGE_SIZE
            last = stop - base
            for start in tl.range(flat - base, last, PAGES):
                listed = start + tl.arange(0, PAGES)
                pages = tl.load(table + listed, mask=listed < last, other=0)
                until = tl.minimum(last - start, PAGES)
                unmasked = tl.minimum(tl.maximum(whole - start, 0), until)
                for place in tl.range(0, unmasked):
                    best = block_maxima(
                        queries,
                        key_pages,
                        key_tiles,
                        key_scales,
                        pick(pages, place, PAGES),
                        start + place,
                        positions,
                        key_stride_page,
                        key_stride_slot,
                        scale_stride,
                        False,
                        N,
                        DIM,
                        DIM_PAD,
                        PAGE_SIZE,
                        KEYS,
                        HAS_SCALES,
                        USE_DESCRIPTORS,
                        DOT_DTYPE,
                    )
                    tl.store(places + start + place, best, mask=exists)
                for place in tl.range(unmasked, until, num_stages=1):
                    best = block_maxima(
                        queries,
                        key_pages,
                        key_tiles,
                        key_scales,
                        pick(pages, place, PAGES),
                        start + place,
                        positions,
                        key_stride_page,
                        key_stride_slot,
                        scale_stride,
                        True,
                        N,
                        DIM,
                        DIM_PAD,
                        PAGE_SIZE,
                        KEYS,
                        HAS_SCALES,
                        USE_DESCRIPTORS,
                        DOT_DTYPE,
                    )
                    tl.store(places + start + place, best, mask=exists)
        flat = stop
        request += 1
