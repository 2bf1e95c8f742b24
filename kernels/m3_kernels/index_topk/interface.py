"""Contract, validation and dispatch of `index_topk`."""

from __future__ import annotations

import torch
from torch import Tensor

from m3_kernels import validation
from m3_kernels.capability import Backend, implementation_for


def index_topk(
    index_q: Tensor,
    index_k_pages: Tensor,
    *,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    topk: int,
    num_local_blocks: int = 1,
    num_init_blocks: int = 0,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Choose, for every query row and index head, the blocks that attention will read.

    The score of a block is the largest raw dot product (fp32, no scale) of the query with a
    visible key of the block. Blocks rank by tier, then score, then lower id; the tiers are the
    first `num_init_blocks` blocks, the newest `num_local_blocks` blocks, all others. Forced
    blocks count inside `topk`. A NaN score counts as -inf, and a visible block of score -inf
    can still be chosen.

    Parameters
    ----------
    index_q : [T, num_index_heads, index_dim], any strides with a contiguous last dimension
    index_k_pages : [P, page_size, index_dim], any strides with a contiguous last dimension
    page_table : int32 [R, max_pages], must cover every sequence
    cu_seqlens_q : int32 [R + 1], never decreasing, from 0 to at most T
    seq_lens : int32 [R], the step's own tokens included
    topk : number of ids per row and head, at least 1
    num_local_blocks : newest blocks always chosen, `own - num_local_blocks < b <= own`
    num_init_blocks : first blocks always chosen, before local ones if both do not fit
    out : int32 [num_index_heads, T, topk], filled when given
    backend : an implementation by name, or "auto" for the best one here

    Returns
    -------
    int32 [num_index_heads, T, topk]; ids ascending, `min(topk, own + 1)` of them, then -1. Padding
    rows and rows at a negative position hold -1 only.

    Raises
    ------
    TypeError : a dtype is not in the contract
    ValueError : a shape, device, layout or count is not in the contract
    IndexError : a visible block has a page outside the pool (CPU implementations only)
    NotImplementedError : nothing can run on this device; the reason is in the message
    """
    device = index_q.device
    validation.require_float("index_q", index_q)
    validation.require_float("index_k_pages", index_k_pages)
    words = "[T, num_index_heads, index_dim]"
    validation.require_shape("index_q", index_q, (None, None, None), words)
    rows, heads, dim = index_q.shape
    words = "[P, page_size, index_dim]"
    validation.require_shape("index_k_pages", index_k_pages, (None, None, dim), words)
    validation.require_dense_rows("index_q", index_q)
    validation.require_dense_rows("index_k_pages", index_k_pages)
    validation.require_device("index_k_pages", index_k_pages, device)
    validation.require_batch(
        page_table=page_table, cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens, device=device
    )
    if topk < 1:
        raise ValueError(f"topk must be at least 1; got {topk}")
    if num_local_blocks < 0:
        raise ValueError(f"num_local_blocks must not be negative; got {num_local_blocks}")
    if num_init_blocks < 0:
        raise ValueError(f"num_init_blocks must not be negative; got {num_init_blocks}")
    if out is None:
        out = torch.empty(heads, rows, topk, dtype=torch.int32, device=device)
    else:
        validation.require_dtype("out", out, torch.int32)
        validation.require_shape("out", out, (heads, rows, topk), "[num_index_heads, T, topk]")
        validation.require_dense_rows("out", out)
        validation.require_device("out", out, device)

    implementation = implementation_for("index_topk", backend=backend, device_type=device.type)
    if implementation == "native":
        from m3_kernels.index_topk.native import index_topk_native as run
    elif implementation == "torch":
        from m3_kernels.index_topk.torch_cpu import index_topk_torch as run
    else:
        from m3_kernels.index_topk.reference import index_topk_reference as run
    run(
        index_q,
        index_k_pages,
        page_table=page_table,
        cu_seqlens_q=cu_seqlens_q,
        seq_lens=seq_lens,
        num_local_blocks=num_local_blocks,
        num_init_blocks=num_init_blocks,
        out=out,
    )
    return out
