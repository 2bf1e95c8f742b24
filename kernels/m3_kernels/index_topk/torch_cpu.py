"""`index_topk` and `index_candidates` in chunked plain torch: no compiler, bounded workspace.

Scores go through the BLAS library, whose order of summation depends on the shape of the call. Two
blocks whose scores differ by less than fp32 rounding can therefore swap when a row is computed in
other company; the C++ implementation has no such freedom.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from m3_kernels.index_topk.call import IndexTopk
from m3_kernels.paged import IndexPages

# Bytes of fp32 scores in flight; keys, masks and copies around them stay within three times this.
SCORE_BYTES = 64 * 2**20
KEY_BYTES = 16 * 2**20
LARGEST_QUERY_CODE = 32767


def index_topk_torch(call: IndexTopk) -> None:
    """Fill `call.out`, and `call.scores` of a share."""
    step, topk, out = call.step, call.topk, call.out
    heads = out.shape[0]
    page_size, dim = call.keys.index_k_pages.shape[1:]
    out.fill_(-1)
    if call.scores is not None:
        call.scores.fill_(-math.inf)
    bounds = step.cu_seqlens_q.tolist()
    for request, seq_len in enumerate(step.seq_lens.tolist()):
        first, last = bounds[request : request + 2]
        # A row at a negative position has nothing to see; positions rise, so they come first.
        row = max(first, last - seq_len)
        while row < last:
            blocks = (seq_len - 1) // page_size + 1
            key_blocks = min(blocks, max(1, KEY_BYTES // (page_size * dim * 4)))
            score_row_bytes = 4 * heads * (key_blocks * page_size + 2 * blocks)
            rows = min(last - row, max(1, SCORE_BYTES // score_row_bytes))
            positions = torch.arange(rows, dtype=torch.int64) + (seq_len - (last - row))
            visible = int(positions[-1]) // page_size + 1
            own = positions // page_size
            begin, end = 0, visible
            if call.share is not None:
                begin = min(max(int(call.share.first[request]), 0), visible)
                end = min(max(int(call.share.end[request]), begin), visible)
            if visible <= topk:
                ids = torch.arange(begin, end, dtype=torch.int32).expand(rows, -1)
                ids = torch.where(ids <= own[:, None], ids, -1)
                out[:, row : row + rows, : end - begin] = ids
            elif end > begin:
                scores = _block_scores(
                    call.index_q[row : row + rows],
                    call.keys,
                    step.page_table[request, begin:end],
                    positions,
                    key_blocks,
                    first_block=begin,
                )
                chosen = _choose(
                    scores, own, begin, topk, call.num_local_blocks, call.num_init_blocks
                )
                ids = _ascending_ids(chosen, topk)
                out[:, row : row + rows] = torch.where(ids < 0, -1, ids + begin).transpose(0, 1)
                if call.scores is not None:
                    found = scores.gather(-1, ids.long().clamp_min(0))
                    said = (ids >= 0) & (own >= topk)[:, None, None]
                    found = torch.where(said, found, -math.inf)
                    call.scores[:, row : row + rows] = found.transpose(0, 1)
            row += rows


def _block_scores(
    queries: Tensor,
    keys_in_pages: IndexPages,
    page_ids: Tensor,
    positions: Tensor,
    chunk: int,
    *,
    first_block: int,
) -> Tensor:
    """Maxima [rows, heads, blocks] of the blocks from `first_block` on that lie in `page_ids`.

    -inf where a block has no visible key.
    """
    rows, heads, dim = queries.shape
    pages, low = keys_in_pages.index_k_pages, keys_in_pages.index_k_low
    scales = keys_in_pages.index_k_scales
    page_size = pages.shape[1]
    flat = queries.float().reshape(rows * heads, dim)
    if low is not None:
        # Sums of products of 16-bit integers are exact in fp64, whatever their order.
        flat = in_fixed_point(flat).double()
    scores = torch.empty(rows, heads, page_ids.shape[0])
    for start in range(0, page_ids.shape[0], chunk):
        ids = page_ids[start : start + chunk].long()
        # Keys past the last row's position are not visible to any row; they may hold anything.
        keys = pages[ids].to(flat.dtype)
        if low is not None:
            keys = 256 * keys + low[ids]
        dots = (flat @ keys.reshape(-1, dim).T).float().view(rows, heads, -1)
        if scales is not None:
            dots *= scales[ids].float().flatten()
        dots.masked_fill_(dots.isnan(), -math.inf)
        first_key = (first_block + start) * page_size
        if first_key + dots.shape[2] - 1 > int(positions[0]):
            key_positions = torch.arange(dots.shape[2]) + first_key
            dots.masked_fill_((key_positions > positions[:, None])[:, None], -math.inf)
        torch.amax(
            dots.view(rows, heads, len(ids), page_size),
            dim=-1,
            out=scores[:, :, start : start + len(ids)],
        )
    return scores


def in_fixed_point(queries: Tensor) -> Tensor:
    """Queries [..., dim] as whole fp32 numbers up to 32767; NaN where one is not finite.

    The step of a query is its own: scores are compared within a row and head alone.
    """
    steps = queries.abs().amax(dim=-1, keepdim=True) / LARGEST_QUERY_CODE
    steps = torch.where(steps.isfinite(), steps, torch.nan)
    codes = (queries / torch.where(steps == 0, 1, steps)).round()
    return codes.clamp(-LARGEST_QUERY_CODE, LARGEST_QUERY_CODE)


def _choose(
    scores: Tensor,
    own: Tensor,
    first_block: int,
    topk: int,
    num_local_blocks: int,
    num_init_blocks: int,
) -> Tensor:
    """Mask [rows, heads, blocks] of the chosen blocks from `first_block` on, tier by tier."""
    ids = torch.arange(scores.shape[2]) + first_block
    own = own[:, None, None]
    visible = ids <= own
    init = visible & (ids < num_init_blocks)
    local = visible & (ids > own - num_local_blocks) & ~init
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    left = torch.full((*scores.shape[:2], 1), topk)
    for tier in (init, local, visible & ~init & ~local):
        picked = _best(scores, tier.expand_as(scores), left)
        chosen |= picked
        left = left - picked.sum(dim=-1, keepdim=True)
    return chosen


def _best(scores: Tensor, eligible: Tensor, count: Tensor) -> Tensor:
    """Mask of the `count` best eligible blocks; equal scores go to the lower id."""
    take = torch.minimum(count, eligible.sum(dim=-1, keepdim=True))
    most = int(take.max())
    if most == 0:
        return torch.zeros_like(eligible)
    best = torch.where(eligible, scores, -math.inf).topk(most, dim=-1).values
    threshold = best.gather(-1, (take - 1).clamp_min(0))
    above = eligible & (scores > threshold)
    equal = eligible & (scores == threshold)
    room = take - above.sum(dim=-1, keepdim=True)
    return (take > 0) & (above | (equal & (equal.cumsum(dim=-1) <= room)))


def _ascending_ids(chosen: Tensor, topk: int) -> Tensor:
    """Ids [rows, heads, topk] of a mask with at most `topk` true values per row, tail -1."""
    blocks = chosen.shape[2]
    ids = torch.where(chosen, torch.arange(blocks, dtype=torch.int32), blocks)
    ids = pad(ids, (0, max(0, topk - blocks)), value=blocks)
    ids = ids.topk(topk, dim=-1, largest=False, sorted=True).values
    return torch.where(ids < blocks, ids, -1)
