"""The oracle of `index_topk`: one row and one head at a time, as the maths is written."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from m3_kernels.index_topk.call import IndexTopk


def index_topk_reference(call: IndexTopk) -> None:
    """Fill `call.out`."""
    index_q, step = call.index_q, call.step
    pages, scales = call.keys.index_k_pages, call.keys.index_k_scales
    call.out.fill_(-1)
    if scales is not None:
        pages = dequantised(pages, scales)
    for request, seq_len in enumerate(step.seq_lens.tolist()):
        first, last = step.cu_seqlens_q[request : request + 2].tolist()
        keys = sequence_keys(pages, step.page_table[request], seq_len)
        for row in range(first, last):
            position = seq_len - (last - row)
            if position < 0:
                continue
            for head in range(index_q.shape[1]):
                scores = block_scores(
                    index_q[row, head].float(), keys[: position + 1], pages.shape[1]
                )
                ids = choose(scores, call.topk, call.num_local_blocks, call.num_init_blocks)
                call.out[head, row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)


def sequence_keys(pages: Tensor, page_ids: Tensor, seq_len: int) -> Tensor:
    """The keys of one sequence in order, fp32 [seq_len, index_dim]."""
    page_size = pages.shape[1]
    used = page_ids[: -(-seq_len // page_size)].long()
    return pages[used].float().flatten(0, 1)[:seq_len]


def dequantised(pages: Tensor, scales: Tensor) -> Tensor:
    """The fp32 keys that stored ones of 8 bits stand for."""
    return pages.float() * scales.float()[:, :, None]


def block_scores(query: Tensor, keys: Tensor, block_size: int) -> list[float]:
    """The largest dot product per block; NaN counts as -inf. Source: m3-spec, MSA maths."""
    scores = (keys * query).sum(dim=1)
    scores = torch.where(scores.isnan(), -math.inf, scores)
    return [float(block.max()) for block in scores.split(block_size)]


def choose(
    scores: list[float], topk: int, num_local_blocks: int, num_init_blocks: int
) -> list[int]:
    """The ids of the best blocks, ascending: forced tiers first, then score, then lower id."""
    own = len(scores) - 1

    def rank(block: int) -> tuple[int, float, int]:
        if block < num_init_blocks:
            tier = 0
        elif block > own - num_local_blocks:
            tier = 1
        else:
            tier = 2
        return tier, -scores[block], block

    return sorted(sorted(range(own + 1), key=rank)[:topk])
