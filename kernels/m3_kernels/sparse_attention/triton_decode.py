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
    sum_keys,
    union_of_rows,
)
from m3_kernels.sparse_attention.triton_softmax import LOG2_E, put_result
from m3_kernels.triton_shared import pick
from m3_kernels.work_plan import DECODE_ROWS

MAX_QUERY_LEN = tl.constexpr(DECODE_ROWS)


@triton.jit
def attend_keys(q, k, v, visible, scale, peak, total, acc, KEYS: tl.constexpr, N: tl.constexpr):
    """One step of online softmax, keys along the first axis, the few queries along the second.

    A column that sees none of the keys keeps peak, total and acc to the bit: its weights are 0 and
    its factor is exp2(0). Logits are in units of log 2.

    Parameters
    ----------
    q : [D, N]
    k, v : [KEYS, D]
    visible : [KEYS, N]
    peak, total : fp32 [N]
    acc : fp32 [D, N]
    """
    logits = tl.dot(k, q, input_precision="ieee") * scale
    logits = tl.where(visible, logits, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(logits, axis=0))
    # Without any key yet the peak is -inf, and -inf - -inf would be NaN.
    origin = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    factor = tl.exp2(peak - origin)
    weights = tl.exp2(logits - origin[None, :])
    total = total * factor + sum_keys(weights, KEYS, N)
    acc = tl.dot(tl.trans(v), weights.to(v.dtype), acc * factor[None, :], input_precision="ieee")
    return new_peak, total, acc


@triton.jit
def fold(peak, total, acc, next_peak, next_total, next_acc):
    """Add the partial softmax of further keys; [R], [R], [R, D]. Folding onto nothing is exact."""
    new_peak = tl.maximum(peak, next_peak)
    origin = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    factor = tl.exp2(peak - origin)
    next_factor = tl.exp2(next_peak - origin)
    total = total * factor + next_total * next_factor
    acc = acc * factor[:, None] + next_acc * next_factor[:, None]
    return new_peak, total, acc


@triton.jit
def attend_masked(
    query,
    k_head,
    v_head,
    k_stride_page,
    k_stride_slot,
    v_stride_page,
    v_stride_slot,
    blocks,
    pages,
    bits,
    first_step,
    end_step,
    turn,
    newest,
    column_row,
    column_position,
    scale,
    peak,
    total,
    acc,
    KEYS: tl.constexpr,
    N: tl.constexpr,
    UNION: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attend to steps of the union where not every row sees every key.

    Parameters
    ----------
    turn : bit r is set for the rows of the tile that are wanted
    newest : position of the last key that any of them sees; later ones are not read
    """
    TILES: tl.constexpr = (PAGE_SIZE + KEYS - 1) // KEYS
    key = tl.arange(0, KEYS)
    dim = tl.arange(0, HEAD_PAD)
    for step in tl.range(first_step, end_step, num_stages=STAGES):
        place = step // TILES
        in_page = (step % TILES) * KEYS + key
        page = pick(pages, place, UNION).to(tl.int64)
        members = pick(bits, place, UNION) & turn
        position = pick(blocks, place, UNION) * PAGE_SIZE + in_page
        readable = (in_page < PAGE_SIZE) & (position <= tl.where(members > 0, newest, -1))
        k_rows = k_head + page * k_stride_page + in_page.to(tl.int64) * k_stride_slot
        v_rows = v_head + page * v_stride_page + in_page.to(tl.int64) * v_stride_slot
        inside = readable[:, None] & (dim < HEAD_DIM)[None, :]
        k = tl.load(k_rows[:, None] + dim[None, :], mask=inside, other=0.0)
        v = tl.load(v_rows[:, None] + dim[None, :], mask=inside, other=0.0)
        member = (members >> column_row) & 1 > 0
        visible = member[None, :] & (position[:, None] <= column_position[None, :])
        peak, total, acc = attend_keys(
            query,
            k.to(query.dtype),
            v.to(query.dtype),
            visible & readable[:, None],
            scale,
            peak,
            total,
            acc,
            KEYS,
            N,
        )
    return peak, total, acc


@triton.jit
def put_partial(partial, unit, segment, stored, peak, total, acc, SEGMENTS: tl.constexpr):
    """Leave a segment's sums in the workspace; `stored` [N] says for which columns."""
    HEAD_PAD: tl.constexpr = acc.shape[0]
    N: tl.constexpr = acc.shape[1]
    start = partial + (unit.to(tl.int64) * SEGMENTS + segment) * (N * (HEAD_PAD + 2))
    column = tl.arange(0, N)
    dim = tl.arange(0, HEAD_PAD)
    tl.store(start + column[None, :] * HEAD_PAD + dim[:, None], acc, mask=stored[None, :])
    tl.store(start + N * HEAD_PAD + column, peak, mask=stored)
    tl.store(start + N * (HEAD_PAD + 1) + column, total, mask=stored)


@triton.jit
def clear_padding(
    out,
    lse,
    first_row,
    end_row,
    out_stride_row,
    out_stride_head,
    lse_stride_row,
    lse_stride_head,
    HAS_LSE: tl.constexpr,
    Q_HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    """Rows of no request hold 0 and -inf."""
    dim = tl.arange(0, HEAD_PAD)
    head = tl.arange(0, HEADS_PAD)
    nothing = tl.zeros([HEADS_PAD, HEAD_PAD], tl.float32).to(out.dtype.element_ty)
    out_row = out + first_row.to(tl.int64) * out_stride_row
    # an offset, because without HAS_LSE there is no pointer to add to
    lse_place = first_row.to(tl.int64) * lse_stride_row
    for _ in range(first_row, end_row):
        tl.store(
            out_row + (head * out_stride_head)[:, None] + dim[None, :],
            nothing,
            mask=(head < Q_HEADS)[:, None] & (dim < HEAD_DIM)[None, :],
        )
        if HAS_LSE:
            no_key = tl.full([HEADS_PAD], float("-inf"), tl.float32)
            lse_row = lse + lse_place
            tl.store(lse_row + head.to(tl.int64) * lse_stride_head, no_key, mask=head < Q_HEADS)
        out_row += out_stride_row
        lse_place += lse_stride_row


BATCH_SIZES = [
    "num_reqs",
    "num_rows",
    "ids_stride_head",
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
    USE_DESCRIPTORS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """Program (request, KV head, segment), then programs which clear padding rows.

    `k_tiles` and `v_tiles` are descriptors of the pools with tiles [1, 1, KEYS, HEAD_DIM], read
    where USE_DESCRIPTORS is set. `partial` fp32 holds, for each (request, KV head, segment),
    N accumulators of HEAD_PAD, N peaks and N totals; `arrivals` int32 one zero for each
    (request, KV head).
    """
    N: tl.constexpr = ROWS * GROUP_PAD
    SEGMENTS: tl.constexpr = (TOPK + SEGMENT_BLOCKS - 1) // SEGMENT_BLOCKS
    TILES: tl.constexpr = (PAGE_SIZE + KEYS - 1) // KEYS

    program = tl.program_id(0)
    attending = num_reqs * (ROW_GROUPS * KV_HEADS * SEGMENTS)
    if program >= attending:
        first = (program - attending) * CLEAR_ROWS
        clear_padding(
            out,
            lse,
            tl.maximum(first, tl.load(cu_seqlens_q + num_reqs)),
            tl.minimum(first + CLEAR_ROWS, num_rows),
            out_stride_row,
            out_stride_head,
            lse_stride_row,
            lse_stride_head,
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
    if (query_len <= group * ROWS) | (query_len > MAX_QUERY_LEN):
        return

    # Rows of the tile, and what each of them chose.
    first_row = request_row + group * ROWS
    seq_len = tl.load(seq_lens + request)
    positions_start = seq_len - query_len + group * ROWS
    row = tl.arange(0, ROWS)
    row_exists = group * ROWS + row < query_len
    ids = load_chosen(
        block_ids + kv_head.to(tl.int64) * ids_stride_head,
        first_row + row,
        row_exists,
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
    blocks, bits, count = union_of_rows(ids, ROWS, TOPK_PAD, UNION)
    slot = tl.arange(0, UNION)
    table = page_table + request.to(tl.int64) * table_stride
    pages = tl.load(table + blocks, mask=slot < count, other=0)

    # Columns of the tile: (row, head of the group).
    column = tl.arange(0, N)
    column_row = column // GROUP_PAD
    column_head = column % GROUP_PAD
    column_exists = (group * ROWS + column_row < query_len) & (column_head < GROUP)
    column_position = positions_start + column_row
    head = kv_head * GROUP + column_head
    dim = tl.arange(0, HEAD_PAD)
    q_rows = q + (first_row + column_row).to(tl.int64) * q_stride_row + head * q_stride_head
    query = tl.load(
        q_rows[:, None] + dim[None, :],
        mask=column_exists[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    )
    query = tl.trans(query.to(DOT_DTYPE))
    scale_log2 = scale * LOG2_E
    if HAS_K_SCALE:
        scale_log2 *= tl.load(k_scale + kv_head * k_scale_stride)
    k_head = k_pages + kv_head.to(tl.int64) * k_stride_head
    v_head = v_pages + kv_head.to(tl.int64) * v_stride_head
    key = tl.arange(0, KEYS)

    v_factor = 1.0
    if HAS_V_SCALE:
        v_factor = tl.load(v_scale + kv_head * v_scale_stride)

    # Blocks that every row sees to their end need no look at positions.
    ends = (blocks + 1) * PAGE_SIZE
    whole = tl.sum(((slot < count) & (ends <= positions_start + 1)).to(tl.int32), axis=0)
    peak = tl.full([N], float("-inf"), tl.float32)
    total = tl.zeros([N], tl.float32)
    acc = tl.zeros([HEAD_PAD, N], tl.float32)
    for step in tl.range(0, whole * TILES):
        place = step // TILES
        offset = (step % TILES) * KEYS
        page = pick(pages, place, UNION)
        members = pick(bits, place, UNION)
        if USE_DESCRIPTORS:
            k = k_tiles.load([page, kv_head, offset, 0]).reshape(KEYS, HEAD_PAD)
            v = v_tiles.load([page, kv_head, offset, 0]).reshape(KEYS, HEAD_PAD)
        else:
            in_page = (offset + key).to(tl.int64)
            k_rows = k_head + page.to(tl.int64) * k_stride_page + in_page * k_stride_slot
            v_rows = v_head + page.to(tl.int64) * v_stride_page + in_page * v_stride_slot
            if PAGE_SIZE % KEYS == 0 and HEAD_DIM == HEAD_PAD:
                k = tl.load(k_rows[:, None] + dim[None, :])
                v = tl.load(v_rows[:, None] + dim[None, :])
            else:
                inside = (offset + key < PAGE_SIZE)[:, None] & (dim < HEAD_DIM)[None, :]
                k = tl.load(k_rows[:, None] + dim[None, :], mask=inside, other=0.0)
                v = tl.load(v_rows[:, None] + dim[None, :], mask=inside, other=0.0)
        member = (members >> column_row) & 1 > 0
        visible = (offset + key < PAGE_SIZE)[:, None] & member[None, :]
        peak, total, acc = attend_keys(
            query,
            k.to(DOT_DTYPE),
            v.to(DOT_DTYPE),
            visible,
            scale_log2,
            peak,
            total,
            acc,
            KEYS,
            N,
        )
    everyone = tl.full([], (1 << ROWS) - 1, tl.int32)
    peak, total, acc = attend_masked(
        query,
        k_head,
        v_head,
        k_stride_page,
        k_stride_slot,
        v_stride_page,
        v_stride_slot,
        blocks,
        pages,
        bits,
        whole * TILES,
        count * TILES,
        everyone,
        tl.minimum(positions_start + ROWS, seq_len) - 1,
        column_row,
        column_position,
        scale_log2,
        peak,
        total,
        acc,
        KEYS,
        N,
        UNION,
        PAGE_SIZE,
        HEAD_DIM,
        HEAD_PAD,
        TAIL_STAGES,
    )
    if segments <= 1:
        put_result(
            out,
            lse,
            first_row + column_row,
            head,
            column_exists,
            peak,
            total,
            tl.trans(acc),
            v_factor,
            out_stride_row,
            out_stride_head,
            lse_stride_row,
            lse_stride_head,
            HAS_LSE,
            HEAD_DIM,
        )
    else:
        put_partial(partial, unit, segment, column_exists, peak, total, acc, SEGMENTS)
    if ROWS > 1:
        # A value that is not finite times a weight of 0 is NaN: if one shows up, do each row again
        # without the keys of the others. A row that sees none gets the bits it has anywhere else.
        broken = tl.max(tl.max(tl.where(tl.abs(acc) < float("inf"), 0, 1), axis=0), axis=0)
        alone = tl.where(broken > 0, 0, ROWS)
        while alone < ROWS:
            own_peak, own_total, own_acc = attend_masked(
                query,
                k_head,
                v_head,
                k_stride_page,
                k_stride_slot,
                v_stride_page,
                v_stride_slot,
                blocks,
                pages,
                bits,
                whole * 0,
                count * TILES,
                everyone * 0 + (1 << alone),
                positions_start + alone,
                column_row,
                column_position,
                scale_log2,
                tl.full([N], float("-inf"), tl.float32),
                tl.zeros([N], tl.float32),
                tl.zeros([HEAD_PAD, N], tl.float32),
                KEYS,
                N,
                UNION,
                PAGE_SIZE,
                HEAD_DIM,
                HEAD_PAD,
                1,
            )
            stored = column_exists & (column_row == alone)
            if segments <= 1:
                put_result(
                    out,
                    lse,
                    first_row + column_row,
                    head,
                    stored,
                    own_peak,
                    own_total,
                    tl.trans(own_acc),
                    v_factor,
                    out_stride_row,
                    out_stride_head,
                    lse_stride_row,
                    lse_stride_head,
                    HAS_LSE,
                    HEAD_DIM,
                )
            else:
                put_partial(partial, unit, segment, stored, own_peak, own_total, own_acc, SEGMENTS)
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
    for own_row in tl.range(0, tl.minimum(query_len - group * ROWS, ROWS)):
        row_peak = tl.full([GROUP_PAD], float("-inf"), tl.float32)
        row_total = tl.zeros([GROUP_PAD], tl.float32)
        row_acc = tl.zeros([GROUP_PAD, HEAD_PAD], tl.float32)
        columns = own_row * GROUP_PAD + lane
        for part in tl.range(0, segments):
            start = unit_start + part * (N * (HEAD_PAD + 2))
            # Written by other multiprocessors: past this one's own cache.
            part_acc = tl.load(
                start + columns[:, None] * HEAD_PAD + dim[None, :],
                mask=(lane < GROUP)[:, None],
                other=0.0,
                cache_modifier=".cg",
            )
            part_peak = tl.load(
                start + N * HEAD_PAD + columns,
                mask=lane < GROUP,
                other=float("-inf"),
                cache_modifier=".cg",
            )
            part_total = tl.load(
                start + N * (HEAD_PAD + 1) + columns,
                mask=lane < GROUP,
                other=0.0,
                cache_modifier=".cg",
            )
            row_peak, row_total, row_acc = fold(
                row_peak, row_total, row_acc, part_peak, part_total, part_acc
            )
        put_result(
            out,
            lse,
            first_row + own_row + lane * 0,
            kv_head * GROUP + lane,
            lane < GROUP,
            row_peak,
            row_total,
            row_acc,
            v_factor,
            out_stride_row,
            out_stride_head,
            lse_stride_row,
            lse_stride_head,
            HAS_LSE,
            HEAD_DIM,
        )
