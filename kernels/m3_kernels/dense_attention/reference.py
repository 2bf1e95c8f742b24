"""The oracle of `dense_attention`: one row and one head at a time, as the maths is written."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dense_attention_reference(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
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
            pages = page_table[request, : position // page_size + 1].tolist()
            for head in range(q.shape[1]):
                kv_head = head // group
                keys = torch.cat([k_pages[page, kv_head] for page in pages])[: position + 1]
                values = torch.cat([v_pages[page, kv_head] for page in pages])[: position + 1]
                logits = keys.float() @ q[row, head].float() * scale
                log_sum = logits.logsumexp(dim=0)
                if log_sum == -math.inf:
                    continue
                out[row, head] = (logits.softmax(dim=0) @ values.float()).to(out.dtype)
                if lse is not None:
                    lse[row, head] = log_sum
