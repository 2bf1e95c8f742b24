"""Decode and verify: the 1 to 8 query rows of a request attend to their chosen blocks.

One program takes one segment of the chosen blocks of one request and KV head. A segment is a fixed
range of a row's own ranks, so it holds the same blocks whatever is computed beside the row; the
program walks the union of its rows' segments, where a block that a row did not choose changes
nothing of that row. Partial results meet in the workspace, and the program that arrives last folds
them in the order of the segments.
"""

from __future__ import annotations

import triton
import triton.language as tl

from m3_kernels.sparse_attention.triton_blocks import (
    ABSENT,
    load_chosen,
    rank_in_row,
    union_of_rows,
    whole_blocks,
)
from m3_kernels.sparse_attention.triton_softmax import (
    LOG2_E,
    Outputs,
    Sums,
    fold,
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

# Parts that are loaded at once when they are folded; more would take more registers than a thread
# has.
PARTS = tl.constexpr(8)


@triton.jit
def put_partial(
    partial,
    unit,
    segment,
    stored,
    sums,
    N: tl.constexpr,
    SEGMENTS: tl.constexpr,
    KEY_AXIS: tl.constexpr,
):
    """Leave a segment's sums in the workspace; `stored` says for which of the first N lines."""
    HEAD_PAD: tl.constexpr = sums.acc.shape[KEY_AXIS]
    start = partial + (unit.to(tl.int64) * SEGMENTS + segment) * (N * (HEAD_PAD + 2))
    line = tl.arange(0, sums.peak.shape[0])
    dim = tl.arange(0, HEAD_PAD)
    place = tl.expand_dims(line, KEY_AXIS) * HEAD_PAD + tl.expand_dims(dim, 1 - KEY_AXIS)
    tl.store(start + place, sums.acc, mask=tl.expand_dims(stored, KEY_AXIS))
    tl.store(start + N * HEAD_PAD + line, sums.peak, mask=stored)
    tl.store(start + N * (HEAD_PAD + 1) + line, sums.total, mask=stored)


@triton.jit
def load_partial(start, columns, stored, N: tl.constexpr, HEAD_PAD: tl.constexpr):
    """The sums which a segment left from `start` on, of some columns, [columns, HEAD_PAD]."""
    dim = tl.arange(0, HEAD_PAD)
    # Written by other multiprocessors: past this one's own cache.
    acc = tl.load(
        start + columns[:, None] * HEAD_PAD + dim[None, :],
        mask=stored[:, None],
        other=0.0,
        cache_modifier=".cg",
    )
    start += N * HEAD_PAD
    peak = tl.load(start + columns, mask=stored, other=float("-inf"), cache_modifier=".cg")
    total = tl.load(start + N + columns, mask=stored, other=0.0, cache_modifier=".cg")
    return Sums(peak, total, acc)


@triton.jit
def clear_padding(
    outputs,
    first_row,
    end_row,
    HAS_LSE: tl.constexpr,
    Q_HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """Rows of no request hold 0 and -inf."""
    head = tl.arange(0, HEADS_PAD)
    nothing = no_keys(1, HEADS_PAD, HEAD_PAD)
    for row in range(first_row, end_row):
        put_result(outputs, row + head * 0, head, head < Q_HEADS, nothing, 1, HAS_LSE, HEAD_DIM)


BATCH_SIZES = [
    "num_reqs",
    "num_rows",
    "ids_stride_head",
    "table_stride",
    "lse_stride_row",
    "lse_stride_head",
]


@triton.jit(do_not_specialize=BATCH_SIZES)
def sparse_attention_decode_kernel(
    q,
    k_pages,
    v_pages,
    k_tiles,
    v_tiles,
    block_ids,
    page_table,
    cu_seqlens_q,
    seq_lens,
    k_scale,
    v_scale,
    out,
    lse,
    partial,
    arrivals,
    scale,
    num_reqs,
    num_rows,
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
    KV_HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_GROUPS: tl.constexpr,
    LINES: tl.constexpr,
    KEY_AXIS: tl.constexpr,
    DECODE_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TOPK: tl.constexpr,
    TOPK_PAD: tl.constexpr,
    SEGMENT_BLOCKS: tl.constexpr,
    UNION: tl.constexpr,
    KEYS: tl.constexpr,
    CLEAR_ROWS: tl.constexpr,
    TAIL_STAGES: tl.constexpr,
    CHECK_AT_ONCE: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (request, KV head, segment), then programs which clear padding rows.

    `k_tiles` and `v_tiles` are descriptors of the pools with tiles [1, 1, KEYS, HEAD_DIM], read
    where USE_DESCRIPTORS is set. `partial` fp32 holds, for each (request, KV head, segment),
    N accumulators of HEAD_PAD, N peaks and N totals, of the lines that can
    exist; `arrivals` int32 one zero for each
    (request, KV head).
    """
    await_previous_launch(PDL)
    N: tl.constexpr = ROWS * GROUP_PAD
    SEGMENTS: tl.constexpr = (TOPK + SEGMENT_BLOCKS - 1) // SEGMENT_BLOCKS
    TILES: tl.constexpr = (PAGE_SIZE + KEYS - 1) // KEYS

    program = tl.program_id(0)
    attending = num_reqs * (ROW_GROUPS * KV_HEADS * SEGMENTS)
    if program >= attending:
        first = (program - attending) * CLEAR_ROWS
        clear_padding(
            Outputs(
                out, out_stride_row, out_stride_head, lse, lse_stride_row, lse_stride_head, 1.0
            ),
            tl.maximum(first, tl.load(cu_seqlens_q + num_reqs)),
            tl.minimum(first + CLEAR_ROWS, num_rows),
            HAS_LSE,
            KV_HEADS * GROUP,
            HEADS_PAD,
            HEAD_DIM,
            HEAD_PAD,
        )
        return
    segment = program % SEGMENTS
    unit = program // SEGMENTS
    kv_head = unit % KV_HEADS
    group = unit // KV_HEADS % ROW_GROUPS
    request = unit // (KV_HEADS * ROW_GROUPS)
    request_row = tl.load(cu_seqlens_q + request)
    query_len = tl.load(cu_seqlens_q + request + 1) - request_row
    if (query_len <= group * ROWS) | (query_len > DECODE_ROWS):
        return

    # Rows of the tile, and what each of them chose.
    first_row = request_row + group * ROWS
    rows_left = query_len - group * ROWS
    seq_len = tl.load(seq_lens + request)
    positions_start = seq_len - rows_left
    row = tl.arange(0, ROWS)
    ids = load_chosen(
        block_ids + kv_head.to(tl.int64) * ids_stride_head,
        first_row + row,
        row < rows_left,
        positions_start + row,
        ids_stride_row,
        PAGE_SIZE,
        TOPK,
        TOPK_PAD,
    )
    chosen = tl.sum((ids != ABSENT).to(tl.int32), axis=1)
    segments = (tl.max(chosen, axis=0) + SEGMENT_BLOCKS - 1) // SEGMENT_BLOCKS
    if segment >= tl.maximum(segments, 1):
        return
    ids = tl.where(rank_in_row(ids) // SEGMENT_BLOCKS == segment, ids, ABSENT)
    union = union_of_rows(ids, page_table + request.to(tl.int64) * table_stride, UNION)

    # Lines of the tile: (row, head of the group), and such as fill it up.
    line = tl.arange(0, LINES)
    line_row = line // GROUP_PAD
    line_head = line % GROUP_PAD
    line_exists = (line_row < tl.minimum(rows_left, ROWS)) & (line_head < GROUP)
    lines = Lines(line_row, positions_start + line_row)
    head = kv_head * GROUP + line_head
    query = load_queries(
        q,
        first_row + line_row,
        head,
        line_exists,
        q_stride_row,
        q_stride_head,
        HEAD_DIM,
        HEAD_PAD,
        DOT_DTYPE,
    )
    if KEY_AXIS == 0:
        query = tl.trans(query)
    scale_log2 = scale * LOG2_E * factor_of_head(k_scale, kv_head, k_scale_stride, HAS_K_SCALE)
    k = pages_of(k_pages, k_tiles, kv_head, k_stride_page, k_stride_head, k_stride_slot)
    v = pages_of(v_pages, v_tiles, kv_head, v_stride_page, v_stride_head, v_stride_slot)
    v_factor = factor_of_head(v_scale, kv_head, v_scale_stride, HAS_V_SCALE)
    outputs = Outputs(
        out, out_stride_row, out_stride_head, lse, lse_stride_row, lse_stride_head, v_factor
    )

    # Blocks that every row sees to their end need no look at positions.
    whole = whole_blocks(union, positions_start, PAGE_SIZE) * TILES
    end = union.count * TILES
    sums = attend_whole(
        query,
        k,
        v,
        union,
        whole,
        lines,
        scale_log2,
        no_keys(KEY_AXIS, LINES, HEAD_PAD),
        KEY_AXIS,
        KEYS,
        PAGE_SIZE,
        HEAD_DIM,
        USE_DESCRIPTORS,
    )
    everyone = tl.full([], (1 << ROWS) - 1, tl.int32)
    newest = tl.minimum(positions_start + ROWS, seq_len) - 1
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
        KEY_AXIS,
        KEYS,
        PAGE_SIZE,
        HEAD_DIM,
        TAIL_STAGES,
    )
    if segments <= 1:
        put_result(
            outputs, first_row + line_row, head, line_exists, sums, KEY_AXIS, HAS_LSE, HEAD_DIM
        )
    else:
        put_partial(partial, unit, segment, line_exists, sums, N, SEGMENTS, KEY_AXIS)
    if ROWS > 1:
        alone = tl.where(is_broken(sums, CHECK_AT_ONCE), 0, ROWS)
        while alone < ROWS:
            own_sums = attend_masked(
                query,
                k,
                v,
                union,
                whole * 0,
                end,
                everyone * 0 + (1 << alone),
                positions_start + alone,
                lines,
                scale_log2,
                no_keys(KEY_AXIS, LINES, HEAD_PAD),
                KEY_AXIS,
                KEYS,
                PAGE_SIZE,
                HEAD_DIM,
                1,
            )
            stored = line_exists & (line_row == alone)
            if segments <= 1:
                put_result(
                    outputs,
                    first_row + line_row,
                    head,
                    stored,
                    own_sums,
                    KEY_AXIS,
                    HAS_LSE,
                    HEAD_DIM,
                )
            else:
                put_partial(partial, unit, segment, stored, own_sums, N, SEGMENTS, KEY_AXIS)
            alone += 1
    if segments <= 1:
        return

    # Every thread's stores happen before the arrival that publishes them.
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals + unit, 1, sem="acq_rel", scope="gpu")
    if arrived < segments - 1:
        return
    tl.store(arrivals + unit, 0)
    lane = tl.arange(0, GROUP_PAD)
    unit_start = partial + unit.to(tl.int64) * (SEGMENTS * N * (HEAD_PAD + 2))
    for own_row in tl.range(0, tl.minimum(rows_left, ROWS)):
        own_columns = own_row * GROUP_PAD + lane
        row_sums = no_keys(1, GROUP_PAD, HEAD_PAD)
        for first_part in tl.range(0, segments, PARTS):
            # unrolled, so that no load waits for a fold; folding a part that is absent is exact
            for further in tl.static_range(0, min(PARTS, SEGMENTS)):
                part = first_part + further
                start = unit_start + part * (N * (HEAD_PAD + 2))
                there = lane < tl.where(part < segments, GROUP, 0)
                row_sums = fold(row_sums, load_partial(start, own_columns, there, N, HEAD_PAD))
        put_result(
            outputs,
            first_row + own_row + lane * 0,
            kv_head * GROUP + lane,
            lane < GROUP,
            row_sums,
            1,
            HAS_LSE,
            HEAD_DIM,
        )
