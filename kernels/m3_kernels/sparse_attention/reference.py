"""The oracle of `sparse_attention`: one row and one head at a time, as the maths is written."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sparse_attention_reference(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_ids: Tensor,
    *,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """Fill `out` and `lse`; arguments as in the public function, already checked."""
    page_size = k_pages.shape[2]
    group = q.shape[1] // k_pages.shape[1]
    out.zero_()
    if lse is not None:
        lse.fill_(-math.inf)
    for request in range(seq_lens.shape[0]):
        first, last = cu_seqlens_q[request : request + 2].tolist()
        for row in range(first, last):
            position = int(seq_lens[request]) - (last - row)
            if position < 0:
                continue
            for head in range(q.shape[1]):
                kv_head = head // group
                blocks = {
                    block
                    for block in block_ids[kv_head, row].tolist()
                    if 0 <= block <= position // page_size
                }
                keys, values = [], []
                for block in sorted(blocks):
                    page = int(page_table[request, block])
                    count = min(page_size, position - block * page_size + 1)
                    keys.append(k_pages[page, kv_head, :count].float())
                    values.append(v_pages[page, kv_head, :count].float())
                if not keys:
                    continue
                logits = torch.cat(keys) @ q[row, head].float() * scale
                log_sum = logits.logsumexp(dim=0)
                if log_sum == -math.inf:
                    continue
                out[row, head] = (logits.softmax(dim=0) @ torch.cat(values)).to(out.dtype)
                if lse is not None:
                    lse[row, head] = log_sum
