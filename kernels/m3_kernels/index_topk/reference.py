"""The oracle of `index_topk`: one row and one head at a time, as the maths is written."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from m3_kernels.index_topk.call import IndexTopk


def index_topk_reference(call: IndexTopk) -> None:
    """Fill `call.out`, and `call.scores` of a share."""
    index_q, step = call.index_q, call.step
    pages, scales = call.keys.index_k_pages, call.keys.index_k_scales
    call.out.fill_(-1)
    if call.scores is not None:
        call.scores.fill_(-math.inf)
    if call.keys.index_k_low is not None:
        assert scales is not None
        # integers below 2^15, which fp32 holds
        pages = 256 * pages.float() + call.keys.index_k_low.float()
    elif scales is not None:
        pages = dequantised(pages, scales)
    for request, seq_len in enumerate(step.seq_lens.tolist()):
        first, last = step.cu_seqlens_q[request : request + 2].tolist()
        keys = sequence_keys(pages, step.page_table[request], seq_len)
        for row in range(first, last):
            position = seq_len - (last - row)
            if position < 0:
                continue
            for head in range(index_q.shape[1]):
                query = index_q[row, head].float()
                if call.keys.index_k_low is None:
                    dots = (keys[: position + 1] * query).sum(dim=1)
                else:
                    assert scales is not None
                    used = step.page_table[request, : position // pages.shape[1] + 1].long()
                    steps = scales[used].float().flatten()[: position + 1]
                    dots = fixed_point_scores(query, keys[: position + 1], steps)
                scores = block_scores(dots, pages.shape[1])
                scanned = range(len(scores))
                if call.share is not None:
                    first, end = int(call.share.first[request]), int(call.share.end[request])
                    scanned = range(len(scores))[first:end]
                ids = choose(
                    scores, scanned, call.topk, call.num_local_blocks, call.num_init_blocks
                )
                call.out[head, row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
                if call.scores is not None and len(scores) > call.topk:
                    found = torch.tensor([scores[block] for block in ids])
                    call.scores[head, row, : len(ids)] = found


def sequence_keys(pages: Tensor, page_ids: Tensor, seq_len: int) -> Tensor:
    """The keys of one sequence in order, fp32 [seq_len, index_dim]."""
    page_size = pages.shape[1]
    used = page_ids[: -(-seq_len // page_size)].long()
    return pages[used].float().flatten(0, 1)[:seq_len]


def dequantised(pages: Tensor, scales: Tensor) -> Tensor:
    """The fp32 keys that stored ones of 8 bits stand for."""
    return pages.float() * scales.float()[:, :, None]


def fixed_point_scores(query: Tensor, keys: Tensor, scales: Tensor) -> Tensor:
    """Scores fp32 [keys] of keys of 16-bit integers: the query in 16 bits too, an exact sum.

    A query that is not finite gives NaN, and so does a scale that is not.
    """
    step = query.abs().max() / 32767
    if not math.isfinite(step):
        return torch.full_like(scales, math.nan)
    codes = torch.zeros_like(query) if step == 0 else (query / step).round()
    dots = (keys.long() * codes.clamp(-32767, 32767).long()).sum(dim=1)
    return dots.float() * scales


def block_scores(scores: Tensor, block_size: int) -> list[float]:
    """The largest score per block; NaN counts as -inf. Source: m3-spec, MSA maths."""
    scores = torch.where(scores.isnan(), -math.inf, scores)
    return [float(block.max()) for block in scores.split(block_size)]


def choose(
    scores: list[float], blocks: range, topk: int, num_local_blocks: int, num_init_blocks: int
) -> list[int]:
    """The ids of the best of some blocks, ascending: forced tiers first, then score, then id."""
    own = len(scores) - 1

    def rank(block: int) -> tuple[int, float, int]:
        if block < num_init_blocks:
            tier = 0
        elif block > own - num_local_blocks:
            tier = 1
        else:
            tier = 2
        return tier, -scores[block], block

    return sorted(sorted(blocks, key=rank)[:topk])
