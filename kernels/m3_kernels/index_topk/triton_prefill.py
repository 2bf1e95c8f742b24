"""Scores of the requests of prefill kind: many rows with all heads in one tile.

A program takes a tile of neighbouring rows and a share of the blocks they see. The rows of a tile
may belong to several requests, which it then takes one after the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from m3_kernels.index_topk.triton_scores import Keys, load_queries, score_blocks
from m3_kernels.triton_shared import await_previous_launch


@triton.jit(do_not_specialize=["score_stride", "table_stride", "first_row", "end_row", "num_reqs"])
def index_prefill_scores_kernel(
    index_q,
    key_pages,
    key_tiles,
    key_scales,
    page_table,
    cu_seqlens_q,
    seq_lens,
    row_request,
    scores,
    q_stride_row,
    q_stride_head,
    key_stride_page,
    key_stride_slot,
    scale_stride,
    table_stride,
    score_stride,
    first_row,
    end_row,
    num_reqs,
    HEADS: tl.constexpr,
    DECODE_ROWS: tl.constexpr,
    M: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (tile, share) of the rows `first_row:end_row` of the step.

    `scores` fp32 [end_row - first_row, HEADS, score_stride]; blocks that a row does not see hold
    -inf or are not written.
    """
    await_previous_launch(PDL)
    rows_per_tile: tl.constexpr = M // HEADS
    share = tl.program_id(1)
    shares = tl.num_programs(1)
    begin = first_row + tl.program_id(0) * rows_per_tile
    end = tl.minimum(begin + rows_per_tile, end_row)
    keys = Keys(key_pages, key_stride_page, key_stride_slot, key_tiles, key_scales, scale_stride)
    item = tl.arange(0, M)
    item_row = begin + item // HEADS
    row = begin
    while row < end:
        request = tl.load(row_request + row)
        stop = end
        if request < num_reqs:
            query_begin = tl.load(cu_seqlens_q + request)
            query_end = tl.load(cu_seqlens_q + request + 1)
            stop = tl.minimum(end, query_end)
            if query_end - query_begin > DECODE_ROWS:
                # Position of the row that would stand at index 0 of the step.
                shift = tl.load(seq_lens + request) - query_end
                mine = (item_row >= row) & (item_row < stop) & (item < rows_per_tile * HEADS)
                queries = load_queries(
                    index_q,
                    item_row,
                    item % HEADS,
                    mine,
                    q_stride_row,
                    q_stride_head,
                    DIM,
                    DIM_PAD,
                    DOT_DTYPE,
                )
                places = scores + (item_row - first_row).to(tl.int64) * (HEADS * score_stride)
                visible = (tl.maximum(stop + shift, 0) + PAGE_SIZE - 1) // PAGE_SIZE
                score_blocks(
                    queries,
                    keys,
                    page_table + request.to(tl.int64) * table_stride,
                    visible * share // shares,
                    visible * (share + 1) // shares,
                    # Blocks that the first row, and so every row, sees to their end.
                    tl.maximum(row + shift + 1, 0) // PAGE_SIZE,
                    item_row + shift,
                    places + (item % HEADS).to(tl.int64) * score_stride,
                    mine,
                    1,
                    DIM,
                    PAGE_SIZE,
                    KEYS,
                    HAS_SCALES,
                    USE_DESCRIPTORS,
                )
        row = stop
