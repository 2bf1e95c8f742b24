"""`sparse_attention` in chunked plain torch: any CPU, no compiler, bounded workspace.

The chosen pages of a chunk of rows are gathered and attended in one batched product per chunk. Like
every BLAS product its last bits depend on the shape of the call; the C++ implementation's do not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from m3_kernels.sparse_attention.call import SparseAttention

# Bytes of one fp32 gather of chosen keys; the peak is about four of them (K, V, their low
# precision originals, logits). A single row may exceed it.
GATHER_BYTES = 64 * 2**20


def sparse_attention_torch(call: SparseAttention) -> None:
    """Fill `call.out` and `call.lse`."""
    step, out, lse = call.step, call.out, call.lse
    cu_seqlens_q, seq_lens = step.cu_seqlens_q, step.seq_lens
    kv_heads, page_size, dim = call.kv.k_pages.shape[1:]
    topk = call.block_ids.shape[2]
    out.zero_()
    if lse is not None:
        lse.fill_(-math.inf)
    num_rows = int(cu_seqlens_q[-1])
    if num_rows == 0 or topk == 0:
        return
    q_lens = cu_seqlens_q.diff().long()
    request = torch.repeat_interleave(torch.arange(seq_lens.shape[0]), q_lens)
    position = seq_lens.long()[request] - (
        cu_seqlens_q[1:].long()[request] - torch.arange(num_rows)
    )
    chunk = max(1, GATHER_BYTES // (kv_heads * topk * page_size * dim * 4))
    for start in range(0, num_rows, chunk):
        rows = slice(start, min(start + chunk, num_rows))
        attended, log_sum = _attend(
            call.q[rows],
            call.kv.k_pages,
            call.kv.v_pages,
            call.block_ids[:, rows].transpose(0, 1).long(),
            step.page_table[request[rows]],
            position[rows],
            call.scale,
        )
        out[rows] = attended.to(out.dtype)
        if lse is not None:
            lse[rows] = log_sum


def _attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    ids: Tensor,
    page_table: Tensor,
    position: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Outputs fp32 [rows, q heads, dim] and lse [rows, q heads] of one chunk of rows.

    Parameters
    ----------
    ids : int64 [rows, kv heads, topk]
    page_table : [rows, max_pages], the table of each row's request
    position : int64 [rows]
    """
    rows, kv_heads, topk = ids.shape
    page_size, dim = k_pages.shape[2:]
    group = q.shape[1] // kv_heads
    # Ascending, then drop repeats and whatever names no visible block.
    ids = ids.sort(dim=-1).values
    valid = (ids >= 0) & (ids <= (position // page_size)[:, None, None])
    valid[..., 1:] &= ids[..., 1:] != ids[..., :-1]
    ids = ids.where(valid, 0)
    pages = page_table.gather(1, ids.flatten(1)).view_as(ids).long().where(valid, 0)
    heads = torch.arange(kv_heads)[:, None]
    key_positions = ids[..., None] * page_size + torch.arange(page_size)
    visible = valid[..., None] & (key_positions <= position[:, None, None, None])
    visible = visible.view(rows, kv_heads, 1, topk * page_size)

    keys = k_pages[pages, heads].view(rows, kv_heads, -1, dim).float()
    logits = (q.float().view(rows, kv_heads, group, dim) @ keys.transpose(2, 3)).mul_(scale)
    del keys
    logits = logits.masked_fill_(~visible, -math.inf)
    log_sum = logits.logsumexp(dim=-1, keepdim=True)
    weights = logits.sub_(log_sum.masked_fill(log_sum == -math.inf, 0)).exp_()
    # A weight of zero does not silence an invisible NaN.
    values = v_pages[pages, heads].view(rows, kv_heads, -1, dim).float()
    values.masked_fill_(~visible.transpose(2, 3), 0)
    return (weights @ values).view(rows, -1, dim), log_sum.view(rows, -1)
