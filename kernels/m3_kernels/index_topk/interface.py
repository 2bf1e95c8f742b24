"""Contract, validation and dispatch of `index_topk`."""

from __future__ import annotations

import torch
from torch import Tensor

from m3_kernels import validation
from m3_kernels.capability import Backend, implementation_for
from m3_kernels.work_plan import WorkPlan


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
    index_k_scales: Tensor | None = None,
    out: Tensor | None = None,
    plan: WorkPlan | None = None,
    workspace: Tensor | None = None,
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
    index_k_pages : [P, page_size, index_dim], any strides with a contiguous last dimension;
        float8_e4m3fn and float8_e5m2 are read by "triton" and "reference" only
    page_table : int32 [R, max_pages], must cover every sequence
    cu_seqlens_q : int32 [R + 1], never decreasing, from 0 to at most T
    seq_lens : int32 [R], the step's own tokens included
    topk : number of ids per row and head, at least 1
    num_local_blocks : newest blocks always chosen, `own - num_local_blocks < b <= own`
    num_init_blocks : first blocks always chosen, before local ones if both do not fit
    index_k_scales : floating [P, page_size], what a stored key is multiplied with; int8 keys need
        it, fp8 keys may have it, others have none
    out : int32 [num_index_heads, T, topk], filled when given
    plan : the step's, read by "triton" only; without one it makes its own, which waits for the
        device and allocates
    workspace : fp32 [N] of `allocate_index_topk_workspace`, used by "triton" only; None allocates
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
    if index_k_pages.dtype not in (*validation.FLOAT_DTYPES, *validation.LOW_PRECISION_DTYPES):
        raise TypeError(
            "index_k_pages must be float32, bfloat16, float16, int8, float8_e4m3fn or "
            f"float8_e5m2; got {index_k_pages.dtype}"
        )
    words = "[T, num_index_heads, index_dim]"
    validation.require_shape("index_q", index_q, (None, None, None), words)
    rows, heads, dim = index_q.shape
    words = "[P, page_size, index_dim]"
    validation.require_shape("index_k_pages", index_k_pages, (None, None, dim), words)
    validation.require_dense_rows("index_q", index_q)
    validation.require_dense_rows("index_k_pages", index_k_pages)
    validation.require_device("index_k_pages", index_k_pages, device)
    _require_scales(index_k_pages, index_k_scales)
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
    if index_k_pages.dtype in validation.FP8_DTYPES and implementation in ("native", "torch"):
        raise NotImplementedError(
            f"index_topk: backend {implementation!r} reads float32, bfloat16, float16 and int8 "
            f"index keys; got {index_k_pages.dtype}. Keep them in one of these on a CPU"
        )
    if implementation == "triton":
        if workspace is not None:
            validation.require_dtype("workspace", workspace, torch.float32)
            validation.require_shape("workspace", workspace, (None,), "[N]")
            validation.require_dense_rows("workspace", workspace)
            validation.require_device("workspace", workspace, device)
        from m3_kernels.index_topk.triton import index_topk_triton

        index_topk_triton(
            index_q,
            index_k_pages,
            page_table=page_table,
            cu_seqlens_q=cu_seqlens_q,
            seq_lens=seq_lens,
            num_local_blocks=num_local_blocks,
            num_init_blocks=num_init_blocks,
            out=out,
            index_k_scales=index_k_scales,
            plan=plan,
            workspace=workspace,
        )
        return out
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
        index_k_scales=index_k_scales,
        out=out,
    )
    return out


def _require_scales(pages: Tensor, scales: Tensor | None) -> None:
    if scales is None:
        if pages.dtype == torch.int8:
            raise ValueError(
                "index_k_scales must be given with int8 index_k_pages: one scale per token"
            )
        return
    if pages.dtype not in validation.LOW_PRECISION_DTYPES:
        raise ValueError(
            f"index_k_scales must be None unless index_k_pages are int8 or fp8; "
            f"got {pages.dtype} pages"
        )
    validation.require_float("index_k_scales", scales)
    validation.require_shape("index_k_scales", scales, tuple(pages.shape[:2]), "[P, page_size]")
    validation.require_dense_rows("index_k_scales", scales)
    validation.require_device("index_k_scales", scales, pages.device)
