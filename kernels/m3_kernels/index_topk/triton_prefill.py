"""Scores of the requests of prefill kind: many rows with all heads in one tile.

A program takes a tile of neighbouring rows and a share of the blocks they see. The rows of a tile
may belong to several requests, which it then takes one after the other.
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
    M: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """The best score of a block for each row of the tile, fp32 [M]; as in decode, transposed."""
    best = tl.full([M], float("-inf"), tl.float32)
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
        dots = tl.dot(queries, tl.trans(keys.to(DOT_DTYPE)), input_precision="ieee")
        if HAS_SCALES:
            scales = load_scales(key_scales, page, tile * KEYS, scale_stride, PAGE_SIZE, KEYS)
            dots *= scales[None, :]
        dots = tl.where(dots == dots, dots, float("-inf"))
        slot = tile * KEYS + tl.arange(0, KEYS)
        if MASKED:
            visible = (block * PAGE_SIZE + slot)[None, :] <= positions[:, None]
            dots = tl.where(visible & (slot < PAGE_SIZE)[None, :], dots, float("-inf"))
        elif PAGE_SIZE % KEYS != 0:
            dots = tl.where((slot < PAGE_SIZE)[None, :], dots, float("-inf"))
        best = tl.maximum(best, tl.max(dots, axis=1))
    return best


@triton.jit(do_not_specialize=["score_stride", "first_row", "end_row", "num_reqs"])
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
):
    """Program (tile, share) of the rows `first_row:end_row` of the step.

    `scores` fp32 [end_row - first_row, HEADS, score_stride]; blocks that a row does not see hold
    -inf or are not written.
    """
    rows_per_tile: tl.constexpr = M // HEADS
    share = tl.program_id(1)
    shares = tl.num_programs(1)
    begin = first_row + tl.program_id(0) * rows_per_tile
    end = tl.minimum(begin + rows_per_tile, end_row)
    item = tl.arange(0, M)
    item_row = begin + item // HEADS
    dim = tl.arange(0, DIM_PAD)
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
                positions = item_row + shift
                rows = item_row.to(tl.int64)
                queries = tl.load(
                    (index_q + rows * q_stride_row + (item % HEADS) * q_stride_head)[:, None]
                    + dim[None, :],
                    mask=mine[:, None] & (dim < DIM)[None, :],
                    other=0.0,
                )
                queries = queries.to(DOT_DTYPE)
                table = page_table + request.to(tl.int64) * table_stride
                places = scores + (rows - first_row) * (HEADS * score_stride)
                places += (item % HEADS).to(tl.int64) * score_stride
                # Blocks that the first row, and so every row, sees to their end.
                whole = tl.maximum(row + shift + 1, 0) // PAGE_SIZE
                visible = (tl.maximum(stop + shift, 0) + PAGE_SIZE - 1) // PAGE_SIZE
                last = visible * (share + 1) // shares
                for start in tl.range(visible * share // shares, last, PAGES):
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
                            M,
                            DIM,
                            DIM_PAD,
                            PAGE_SIZE,
                            KEYS,
                            HAS_SCALES,
                            USE_DESCRIPTORS,
                            DOT_DTYPE,
                        )
                        tl.store(places + start + place, best, mask=mine)
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
                            M,
                            DIM,
                            DIM_PAD,
                            PAGE_SIZE,
                            KEYS,
                            HAS_SCALES,
                            USE_DESCRIPTORS,
                            DOT_DTYPE,
                        )
                        tl.store(places + start + place, best, mask=mine)
        row = stop
