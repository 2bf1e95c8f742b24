"""The best `topk` blocks of each row and head, from their scores."""

from __future__ import annotations

import triton
import triton.language as tl

from m3_kernels.triton_shared import await_previous_launch

# What ranks blocks: a key of 32 bits by tier and score, then the lower id. The two largest keys are
# the tiers above all scores; the smallest is below that of -inf.
INIT_KEY = tl.constexpr(2**31 - 1)
LOCAL_KEY = tl.constexpr(2**31 - 2)
TAKEN = tl.constexpr(-(2**31))
NO_BLOCK = tl.constexpr(2**31 - 1)
# Key and id as one number, all of which differ within a row.
ID_BITS = tl.constexpr(29)
ID_MASK = tl.constexpr(2**29 - 1)
KEPT = tl.constexpr(2**63 - 1)


@triton.jit
def keys_of_blocks(score, block, own, num_local_blocks, num_init_blocks, TOPK: tl.constexpr):
    """int32, larger for what is chosen earlier; 0.0 and -0.0 are alike.

    Forced blocks need no order among themselves if there is room for all. If there is not, scores
    decide within the tier that fills the room, and lower tiers are out.
    """
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    # As integers the bits of negative floats fall when the floats rise.
    scored = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    crowded = num_init_blocks + num_local_blocks > TOPK
    init_alone = crowded & (num_init_blocks >= TOPK)
    local = tl.where(crowded, tl.where(init_alone, TAKEN, scored), LOCAL_KEY)
    key = tl.where(crowded, TAKEN, scored)
    key = tl.where(block > own - num_local_blocks, local, key)
    init = tl.where(init_alone, scored, INIT_KEY)
    return tl.where(block < num_init_blocks, init, key)


@triton.jit
def rank_of(key, block):
    """Key and lower id as one positive int64."""
    return ((key.to(tl.int64) + 2147483648) << ID_BITS) | (block ^ ID_MASK).to(tl.int64)


@triton.jit
def best_of(key, block):
    """The largest key, and the lowest id among its blocks: two reductions of 32 bits."""
    top = tl.max(key, axis=0)
    return top, tl.min(tl.where(key == top, block, NO_BLOCK), axis=0)


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

    Blocks are looked at BLOCKS at a time, the newest first, which are chosen most often; what ranks
    above the lowest of the best so far takes its place. A rank is unique, so the result depends on
    no order.
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
    for chunk in tl.range(0, tl.cdiv(scored, BLOCKS)):
        block = (tl.cdiv(scored, BLOCKS) - 1 - chunk) * BLOCKS + tl.arange(0, BLOCKS)
        score = tl.load(
            scores + line * score_stride + block, mask=block < scored, other=float("-inf")
        )
        key = keys_of_blocks(score, block, own, num_local_blocks, num_init_blocks, TOPK)
        key = tl.where(block < scored, key, TAKEN)
        top, first = best_of(key, block)
        low = tl.min(best, axis=0)
        while (top > TAKEN) & (rank_of(top, first) > low):
            best = tl.where(best == low, rank_of(top, first), best)
            key = tl.where(block == first, TAKEN, key)
            top, first = best_of(key, block)
            low = tl.min(best, axis=0)

    chosen = ((best & ID_MASK) ^ ID_MASK).to(tl.int32)
    chosen = tl.where(lane < TOPK, chosen, 2147483647)
    before = tl.sum((chosen[None, :] < chosen[:, None]).to(tl.int32), axis=1)
    chosen = tl.where(scored > 0, chosen, tl.where(lane <= own, lane, -1))
    place = tl.where(scored > 0, before, lane)
    line_out = out + head.to(tl.int64) * out_stride_head + row.to(tl.int64) * out_stride_row
    tl.store(line_out + place, chosen, mask=lane < TOPK)
