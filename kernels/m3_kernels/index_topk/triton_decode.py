"""Scores of the requests of decode kind: every index key is read once, for all rows and heads.

A program takes an equal range of the flat list of (request, block). A block belongs to one program,
so its maximum needs no second one, and which program that is changes no bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from m3_kernels.index_topk.triton_scores import Keys, load_queries, score_blocks
from m3_kernels.triton_shared import await_previous_launch


@triton.jit(do_not_specialize=["score_stride", "table_stride"])
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
    PDL: tl.constexpr,
):
    """Program c scores the blocks of range c of the plan.

    `scores` fp32 [R, SLOTS, HEADS, score_stride]; blocks that a row does not see score -inf.
    `key_tiles` is a descriptor of the pool with tiles [1, KEYS, DIM_PAD], read where
    USE_DESCRIPTORS is set.
    """
    await_previous_launch(PDL)
    program = tl.program_id(0)
    flat = tl.load(range_start + program)
    end = tl.load(range_start + program + 1)
    request = tl.load(range_request + program)
    keys = Keys(key_pages, key_stride_page, key_stride_slot, key_tiles, key_scales, scale_stride)
    column = tl.arange(0, N)
    column_row = column // HEADS
    while flat < end:
        base = tl.load(cum_blocks + request)
        stop = tl.minimum(end, tl.load(cum_blocks + request + 1))
        if stop > flat:
            first_row = tl.load(cu_seqlens_q + request)
            query_len = tl.load(cu_seqlens_q + request + 1) - first_row
            first_position = tl.load(seq_lens + request) - query_len
            exists = column_row < query_len
            queries = load_queries(
                index_q,
                first_row + column_row,
                column % HEADS,
                exists,
                q_stride_row,
                q_stride_head,
                DIM,
                DIM_PAD,
                DOT_DTYPE,
            )
            score_blocks(
                tl.trans(queries),
                keys,
                page_table + request.to(tl.int64) * table_stride,
                flat - base,
                stop - base,
                # Blocks that the first row, and so every row, sees to their end.
                tl.maximum(first_position + 1, 0) // PAGE_SIZE,
                first_position + column_row,
                scores + (request.to(tl.int64) * (SLOTS * HEADS) + column) * score_stride,
                exists,
                0,
                DIM,
                PAGE_SIZE,
                KEYS,
                HAS_SCALES,
                USE_DESCRIPTORS,
            )
        flat = stop
        request += 1
