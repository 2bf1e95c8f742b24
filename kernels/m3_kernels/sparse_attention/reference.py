"""The oracle of `sparse_attention`: one row and one head at a time, as the maths is written."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from m3_kernels.sparse_attention.call import SparseAttention


def sparse_attention_reference(call: SparseAttention) -> None:
    """Fill `call.out` and `call.lse`."""
    q, step, out, lse = call.q, call.step, call.out, call.lse
    k_pages = dequantised(call.kv.k_pages, call.kv.k_scale)
    v_pages = dequantised(call.kv.v_pages, call.kv.v_scale)
    page_size = k_pages.shape[2]
    group = q.shape[1] // k_pages.shape[1]
    out.zero_()
    if lse is not None:
        lse.fill_(-math.inf)
    for request, seq_len in enumerate(step.seq_lens.tolist()):
        first, last = step.cu_seqlens_q[request : request + 2].tolist()
        for row in range(first, last):
            position = seq_len - (last - row)
            if position < 0:
                continue
            for head in range(q.shape[1]):
                kv_head = head // group
                blocks = {
                    block
                    for block in call.block_ids[kv_head, row].tolist()
                    if 0 <= block <= position // page_size
                }
                keys, values = [], []
                for block in sorted(blocks):
                    page = int(step.page_table[request, block])
                    count = min(page_size, position - block * page_size + 1)
                    keys.append(k_pages[page, kv_head, :count].float())
                    values.append(v_pages[page, kv_head, :count].float())
                if not keys:
                    continue
                logits = torch.cat(keys) @ q[row, head].float() * call.scale
                log_sum = logits.logsumexp(dim=0)
                if log_sum == -math.inf:
                    continue
                out[row, head] = (logits.softmax(dim=0) @ torch.cat(values)).to(out.dtype)
                if lse is not None:
                    lse[row, head] = log_sum


def dequantised(pages: Tensor, scale: Tensor | None) -> Tensor:
    """Keys or values of pages times their scale, fp32; without one the pages themselves."""
    return pages if scale is None else pages.float() * scale[:, None, None]
