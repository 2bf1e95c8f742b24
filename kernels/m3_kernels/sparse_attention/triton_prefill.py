"""Prefill: a tile of neighbouring query rows walks the union of the blocks they chose.

Tiles begin at positions which are multiples of their size, and walk their blocks in ascending
order, where a block that a row did not choose changes nothing of that row. So a row has the same
bits however a prompt is cut into chunks and whatever else is in the batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from m3_kernels.sparse_attention.triton_blocks import load_chosen, union_of_rows, whole_blocks
from m3_kernels.sparse_attention.triton_softmax import (
    LOG2_E,
    Outputs,
    is_broken,
    no_keys,
    put_result,
)
from m3_kernels.sparse_attention.triton_walk import (
    Lines,
    attend_masked,
    attend_whole,
    factor_of_head,
    load_queries,
    pages_of,
)
from m3_kernels.triton_shared import await_previous_launch
from m3_kernels.work_plan import TILE_ROWS

# Rows of the plan's tiles; a program takes ROWS of them.
PLAN_ROWS = tl.constexpr(TILE_ROWS)
PLAN_SHIFT = tl.constexpr(TILE_ROWS.bit_length() - 1)


@triton.jit
def request_of(cum_tiles, tile, num_reqs):
    """The request whose tiles contain this one: the last with cum_tiles[request] <= tile."""
    low = num_reqs * 0
    high = num_reqs - 1
    while low < high:
        middle = (low + high + 1) // 2
        begins = tl.load(cum_tiles + middle) <= tile
        low = tl.where(begins, middle, low)
        high = tl.where(begins, high, middle - 1)
    return low


BATCH_SIZES = [
    "num_reqs",
    "max_tiles",
    "ids_stride_head",
    "table_stride",
    "lse_stride_row",
    "lse_stride_head",
]


@triton.jit(do_not_specialize=BATCH_SIZES)
def sparse_attention_prefill_kernel(
    q,
    k_pages,
    v_pages,
    k_tiles,
    v_tiles,
    block_ids,
    page_table,
    cu_seqlens_q,
    seq_lens,
    cum_tiles,
    k_scale,
    v_scale,
    out,
    lse,
    scale,
    num_reqs,
    max_tiles,
    q_stride_row,
    q_stride_head,
    k_stride_page,
    k_stride_head,
    k_stride_slot,
    v_stride_page,
    v_stride_head,
    v_stride_slot,
    ids_stride_head,
    ids_stride_row,
    table_stride,
    out_stride_row,
    out_stride_head,
    lse_stride_row,
    lse_stride_head,
    k_scale_stride,
    v_scale_stride,
    HAS_LSE: tl.constexpr,
    HAS_K_SCALE: tl.constexpr,
    HAS_V_SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TOPK: tl.constexpr,
    TOPK_PAD: tl.constexpr,
    UNION: tl.constexpr,
    KEYS: tl.constexpr,
    TAIL_STAGES: tl.constexpr,
    CHECK_AT_ONCE: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (KV head, tile), tiles of a head side by side: they share most of their blocks.

    `cum_tiles` int32 [R + 1] counts the tiles of the plan; `max_tiles` is the number of programs
    of a head. `k_tiles` and `v_tiles` are descriptors of the pools with tiles
    [1, 1, KEYS, HEAD_DIM], read where USE_DESCRIPTORS is set.
    """
    await_previous_launch(PDL)
    M: tl.constexpr = ROWS * GROUP_PAD
    TILES: tl.constexpr = (PAGE_SIZE + KEYS - 1) // KEYS
    PARTS: tl.constexpr = PLAN_ROWS // ROWS

    program = tl.program_id(0)
    kv_head = program // max_tiles
    tile = program % max_tiles // PARTS
    if tile >= tl.load(cum_tiles + num_reqs):
        return
    request = request_of(cum_tiles, tile, num_reqs)
    request_row = tl.load(cu_seqlens_q + request)
    query_len = tl.load(cu_seqlens_q + request + 1) - request_row
    offset = tl.load(seq_lens + request) - query_len

    # The shift rounds down, also for rows before position 0.
    own_tile = tile - tl.load(cum_tiles + request) + (offset >> PLAN_SHIFT)
    tile_start = own_tile * PLAN_ROWS + program % PARTS * ROWS
    row = tl.arange(0, ROWS)
    own_row = tile_start + row - offset
    row_exists = (own_row >= 0) & (own_row < query_len)
    ids = load_chosen(
        block_ids + kv_head.to(tl.int64) * ids_stride_head,
        request_row + own_row,
        row_exists,
        tile_start + row,
        ids_stride_row,
        PAGE_SIZE,
        TOPK,
        TOPK_PAD,
    )
    union = union_of_rows(ids, page_table + request.to(tl.int64) * table_stride, UNION)

    # Lines of the tile: (row, head of the group).
    line = tl.arange(0, M)
    line_row = line // GROUP_PAD
    line_head = line % GROUP_PAD
    line_position = tile_start + line_row
    out_row = request_row + line_position - offset
    line_exists = (line_position >= offset) & (line_position < offset + query_len)
    line_exists = line_exists & (line_head < GROUP)
    lines = Lines(line_row, line_position)
    head = kv_head * GROUP + line_head
    query = load_queries(
        q,
        out_row,
        head,
        line_exists,
        q_stride_row,
        q_stride_head,
        HEAD_DIM,
        HEAD_PAD,
        DOT_DTYPE,
    )
    scale_log2 = scale * LOG2_E * factor_of_head(k_scale, kv_head, k_scale_stride, HAS_K_SCALE)
    k = pages_of(k_pages, k_tiles, kv_head, k_stride_page, k_stride_head, k_stride_slot)
    v = pages_of(v_pages, v_tiles, kv_head, v_stride_page, v_stride_head, v_stride_slot)
    v_factor = factor_of_head(v_scale, kv_head, v_scale_stride, HAS_V_SCALE)
    outputs = Outputs(
        out, out_stride_row, out_stride_head, lse, lse_stride_row, lse_stride_head, v_factor
    )

    # Blocks that end before the tile begins need no look at positions.
    whole = whole_blocks(union, tile_start, PAGE_SIZE) * TILES
    end = union.count * TILES
    sums = attend_whole(
        query,
        k,
        v,
        union,
        whole,
        lines,
        scale_log2,
        no_keys(1, M, HEAD_PAD),
        1,
        KEYS,
        PAGE_SIZE,
        HEAD_DIM,
        USE_DESCRIPTORS,
    )
    everyone = tl.full([], (1 << ROWS) - 1, tl.int32)
    newest = tl.minimum(tile_start + ROWS, offset + query_len) - 1
    sums = attend_masked(
        query,
        k,
        v,
        union,
        whole,
        end,
        everyone,
        newest,
        lines,
        scale_log2,
        sums,
        1,
        KEYS,
        PAGE_SIZE,
        HEAD_DIM,
        TAIL_STAGES,
    )
    put_result(outputs, out_row, head, line_exists, sums, 1, HAS_LSE, HEAD_DIM)
    alone = tl.where(is_broken(sums, CHECK_AT_ONCE), 0, ROWS)
    while alone < ROWS:
        sums = attend_masked(
            query,
            k,
            v,
            union,
            whole * 0,
            end,
            everyone * 0 + (1 << alone),
            tile_start + alone,
            lines,
            scale_log2,
            no_keys(1, M, HEAD_PAD),
            1,
            KEYS,
            PAGE_SIZE,
            HEAD_DIM,
            1,
        )
        stored = line_exists & (line_row == alone)
        put_result(outputs, out_row, head, stored, sums, 1, HAS_LSE, HEAD_DIM)
        alone += 1
