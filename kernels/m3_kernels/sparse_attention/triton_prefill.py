"""Prefill: a tile of neighbouring query rows walks the union of the blocks they chose.

Tiles begin at positions which are multiples of their size, and walk their blocks in ascending
order, where a block that a row did not choose changes nothing of that row. So a row has the same
bits however a prompt is cut into chunks and whatever else is in the batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from m3_kernels.sparse_attention.triton_blocks import load_chosen, union_of_rows
from m3_kernels.sparse_attention.triton_softmax import LOG2_E, put_result
from m3_kernels.triton_shared import pick
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


@triton.jit
def attend_rows(q, k, v, visible, scale, peak, total, acc):
    """One step of online softmax, query rows along the first axis.

    A row that sees none of the keys keeps peak, total and acc to the bit: its weights are 0 and
    its factor is exp2(0). Logits are in units of log 2.

    Parameters
    ----------
    q : [M, D]
    k, v : [KEYS, D]
    visible : [M, KEYS]
    peak, total : fp32 [M]
    acc : fp32 [M, D]
    """
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    logits = tl.where(visible, logits, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(logits, axis=1))
    # Without any key yet the peak is -inf, and -inf - -inf would be NaN.
    origin = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    factor = tl.exp2(peak - origin)
    weights = tl.exp2(logits - origin[:, None])
    total = total * factor + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * factor[:, None], input_precision="ieee")
    return new_peak, total, acc


@triton.jit
def attend_rows_masked(
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
    line_row,
    line_position,
    scale,
    peak,
    total,
    acc,
    KEYS: tl.constexpr,
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
        member = (members >> line_row) & 1 > 0
        visible = member[:, None] & (position[None, :] <= line_position[:, None])
        peak, total, acc = attend_rows(
            query,
            k.to(query.dtype),
            v.to(query.dtype),
            visible & readable[None, :],
            scale,
            peak,
            total,
            acc,
        )
    return peak, total, acc


BATCH_SIZES = ["num_reqs", "max_tiles", "ids_stride_head", "lse_stride_row", "lse_stride_head"]


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
    USE_DESCRIPTORS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """Program (KV head, tile), tiles of a head side by side: they share most of their blocks.

    `cum_tiles` int32 [R + 1] counts the tiles of the plan; `max_tiles` is the number of programs
    of a head. `k_tiles` and `v_tiles` are descriptors of the pools with tiles
    [1, 1, KEYS, HEAD_DIM], read where USE_DESCRIPTORS is set.
    """
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
    blocks, bits, count = union_of_rows(ids, ROWS, TOPK_PAD, UNION)
    slot = tl.arange(0, UNION)
    table = page_table + request.to(tl.int64) * table_stride
    pages = tl.load(table + blocks, mask=slot < count, other=0)

    # Lines of the tile: (row, head of the group).
    line = tl.arange(0, M)
    line_row = line // GROUP_PAD
    line_head = line % GROUP_PAD
    line_position = tile_start + line_row
    out_row = request_row + line_position - offset
    line_exists = (line_position >= offset) & (line_position < offset + query_len)
    line_exists = line_exists & (line_head < GROUP)
    head = kv_head * GROUP + line_head
    dim = tl.arange(0, HEAD_PAD)
    q_rows = q + out_row.to(tl.int64) * q_stride_row + head * q_stride_head
    query = tl.load(
        q_rows[:, None] + dim[None, :],
        mask=line_exists[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    ).to(DOT_DTYPE)
    scale_log2 = scale * LOG2_E
    if HAS_K_SCALE:
        scale_log2 *= tl.load(k_scale + kv_head * k_scale_stride)
    v_factor = 1.0
    if HAS_V_SCALE:
        v_factor = tl.load(v_scale + kv_head * v_scale_stride)
    k_head = k_pages + kv_head.to(tl.int64) * k_stride_head
    v_head = v_pages + kv_head.to(tl.int64) * v_stride_head
    key = tl.arange(0, KEYS)

    # Blocks that end before the tile begins need no look at positions.
    ends = (blocks + 1) * PAGE_SIZE
    whole = tl.sum(((slot < count) & (ends <= tile_start + 1)).to(tl.int32), axis=0)
    peak = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, HEAD_PAD], tl.float32)
    for step in tl.range(0, whole * TILES):
        place = step // TILES
        begin = (step % TILES) * KEYS
        page = pick(pages, place, UNION)
        members = pick(bits, place, UNION)
        if USE_DESCRIPTORS:
            k = k_tiles.load([page, kv_head, begin, 0]).reshape(KEYS, HEAD_PAD)
            v = v_tiles.load([page, kv_head, begin, 0]).reshape(KEYS, HEAD_PAD)
        else:
            in_page = (begin + key).to(tl.int64)
            k_rows = k_head + page.to(tl.int64) * k_stride_page + in_page * k_stride_slot
            v_rows = v_head + page.to(tl.int64) * v_stride_page + in_page * v_stride_slot
            if PAGE_SIZE % KEYS == 0 and HEAD_DIM == HEAD_PAD:
                k = tl.load(k_rows[:, None] + dim[None, :])
                v = tl.load(v_rows[:, None] + dim[None, :])
            else:
                inside = (begin + key < PAGE_SIZE)[:, None] & (dim < HEAD_DIM)[None, :]
                k = tl.load(k_rows[:, None] + dim[None, :], mask=inside, other=0.0)
                v = tl.load(v_rows[:, None] + dim[None, :], mask=inside, other=0.0)
        member = (members >> line_row) & 1 > 0
        visible = member[:, None] & (begin + key < PAGE_SIZE)[None, :]
        peak, total, acc = attend_rows(
            query, k.to(DOT_DTYPE), v.to(DOT_DTYPE), visible, scale_log2, peak, total, acc
        )
    everyone = tl.full([], (1 << ROWS) - 1, tl.int32)
    newest = tl.minimum(tile_start + ROWS, offset + query_len) - 1
    peak, total, acc = attend_rows_masked(
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
        newest,
        line_row,
        line_position,
        scale_log2,
        peak,
        total,
        acc,
        KEYS,
        UNION,
        PAGE_SIZE,
        HEAD_DIM,
        HEAD_PAD,
        TAIL_STAGES,
    )
    put_result(
        out,
        lse,
        out_row,
        head,
        line_exists,
        peak,
        total,
        acc,
        v_factor,
        out_stride_row,
        out_stride_head,
        lse_stride_row,
        lse_stride_head,
        HAS_LSE,
        HEAD_DIM,
    )
    # A value that is not finite times a weight of 0 is NaN: if one shows up, do each row again
    # without the keys of the others. A row that sees none gets the bits it has anywhere else.
    broken = tl.max(tl.max(tl.where(tl.abs(acc) < float("inf"), 0, 1), axis=1), axis=0)
    alone = tl.where(broken > 0, 0, ROWS)
    while alone < ROWS:
        peak, total, acc = attend_rows_masked(
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
            tile_start + alone,
            line_row,
            line_position,
            scale_log2,
            tl.full([M], float("-inf"), tl.float32),
            tl.zeros([M], tl.float32),
            tl.zeros([M, HEAD_PAD], tl.float32),
            KEYS,
            UNION,
            PAGE_SIZE,
            HEAD_DIM,
            HEAD_PAD,
            1,
        )
        put_result(
            out,
            lse,
            out_row,
            head,
            line_exists & (line_row == alone),
            peak,
            total,
            acc,
            v_factor,
            out_stride_row,
            out_stride_head,
            lse_stride_row,
            lse_stride_head,
            HAS_LSE,
            HEAD_DIM,
        )
        alone += 1
