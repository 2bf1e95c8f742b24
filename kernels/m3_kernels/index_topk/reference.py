"""The oracle of `index_topk`: one row and one head at a time, as the maths is written."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def index_topk_reference(
    index_q: Tensor,
    index_k_pages: Tensor,
    *,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    num_local_blocks: int,
    num_init_blocks: int,
    index_k_scales: Tensor | None,
    out: Tensor,
) -> None:
    """Fill `out`; arguments as in the public function, already checked."""
    heads, _, topk = out.shape
    out.fill_(-1)
    if index_k_scales is not None:
        index_k_pages = dequantised(index_k_pages, index_k_scales)
    for request in range(seq_lens.shape[0]):
        first, last = cu_seqlens_q[request : request + 2].tolist()
        seq_len = int(seq_lens[request])
        keys = sequence_keys(index_k_pages, page_table[request], seq_len)
        for row in range(first, last):
            position = seq_len - (last - row)
            if position < 0:
                continue
            for head in range(heads):
                scores = block_scores(
                    index_q[row, head].float(), keys[: position + 1], index_k_pages.shape[1]
                )
                ids = choose(scores, topk, num_local_blocks, num_init_blocks)
                out[head, row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)


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
