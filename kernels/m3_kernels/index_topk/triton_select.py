"""The best `topk` blocks of each row and head, from their scores."""

from __future__ import annotations

import triton
import triton.language as tl

from m3_kernels.triton_shared import await_previous_launch

# A block's rank as one number: tier, then score, then lower id. All ranks of a row differ.
ID_BITS = tl.constexpr(29)
ID_MASK = tl.constexpr(2**29 - 1)
TIER_SHIFT = tl.constexpr(61)
TAKEN = tl.constexpr(-(2**62))
KEPT = tl.constexpr(2**63 - 1)


@triton.jit
def rank_of_blocks(score, block, own, num_local_blocks, num_init_blocks):
    """Positive int64, larger for what is chosen earlier; 0.0 and -0.0 rank alike."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    # As integers the bits of negative floats fall when the floats rise.
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2147483648
    local = tl.where(block > own - num_local_blocks, 1, 0)
    tier = tl.where(block < num_init_blocks, 2, local).to(tl.int64)
    return (tier << TIER_SHIFT) | (ordered << ID_BITS) | (block ^ ID_MASK).to(tl.int64)


@triton.jit(do_not_specialize=["first_row", "num_reqs", "score_stride"])
def index_select_kernel(
    scores,
    row_request,
    cu_seqlens_q,
    seq_lens,
    out,
    first_row,
    num_reqs,
    score_stride,
    out_stride_head,
    out_stride_row,
    num_local_blocks,
    num_init_blocks,
    HEADS: tl.constexpr,
    SLOTS: tl.constexpr,
    DECODE_ROWS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TOPK: tl.constexpr,
    TOPK_PAD: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (row, head), rows from `first_row` on.

    SLOTS > 0: the rows of decode kind, whose scores are [R, SLOTS, HEADS, score_stride], and
    padding. SLOTS = 0: those of prefill kind, with scores [rows, HEADS, score_stride].

    Blocks are looked at BLOCKS at a time; what ranks above the lowest of the best so far takes its
    place. A rank is unique, so the result depends on no order.
    """
    await_previous_launch(PDL)
    program = tl.program_id(0)
    row = first_row + program // HEADS
    head = program % HEADS
    request = tl.load(row_request + row)
    padding = request >= num_reqs
    request = tl.minimum(request, num_reqs - 1)
    query_begin = tl.load(cu_seqlens_q + request)
    query_end = tl.load(cu_seqlens_q + request + 1)
    decode = padding | (query_end - query_begin <= DECODE_ROWS)
    if decode != (SLOTS > 0):
        return
    position = tl.load(seq_lens + request) - (query_end - row)
    position = tl.where(padding, -1, position)
    # Division truncates towards zero; a row before position 0 sees nothing.
    own = tl.where(position < 0, -1, position // PAGE_SIZE)
    if SLOTS > 0:
        line = (request * SLOTS + row - query_begin).to(tl.int64) * HEADS + head
    else:
        line = (row - first_row).to(tl.int64) * HEADS + head

    lane = tl.arange(0, TOPK_PAD)
    best = tl.where(lane < TOPK, -1 - lane.to(tl.int64), KEPT)
    # Rows that see no more than TOPK blocks need no scores.
    scored = tl.where(own < TOPK, 0, own + 1)
    for start in tl.range(0, scored, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        score = tl.load(
            scores + line * score_stride + block, mask=block < scored, other=float("-inf")
        )
        rank = rank_of_blocks(score, block, own, num_local_blocks, num_init_blocks)
        rank = tl.where(block < scored, rank, TAKEN)
        top = tl.max(rank, axis=0)
        low = tl.min(best, axis=0)
        while top > low:
            best = tl.where(best == low, top, best)
            rank = tl.where(rank == top, TAKEN, rank)
            top = tl.max(rank, axis=0)
            low = tl.min(best, axis=0)

    chosen = ((best & ID_MASK) ^ ID_MASK).to(tl.int32)
    chosen = tl.where(lane < TOPK, chosen, 2147483647)
    before = tl.sum((chosen[None, :] < chosen[:, None]).to(tl.int32), axis=1)
    chosen = tl.where(scored > 0, chosen, tl.where(lane <= own, lane, -1))
    place = tl.where(scored > 0, before, lane)
    line_out = out + head.to(tl.int64) * out_stride_head + row.to(tl.int64) * out_stride_row
    tl.store(line_out + place, chosen, mask=lane < TOPK)
