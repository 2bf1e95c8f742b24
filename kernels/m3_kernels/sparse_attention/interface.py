"""Contract, validation and dispatch of `sparse_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from m3_kernels import validation
from m3_kernels.capability import Backend, implementation_for
from m3_kernels.sparse_attention.flashinfer import PrefillAttention
from m3_kernels.sparse_attention.workspace import SparseAttentionWorkspace
from m3_kernels.work_plan import WorkPlan


def sparse_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_ids: Tensor,
    *,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    plan: WorkPlan | None = None,
    workspace: SparseAttentionWorkspace | None = None,
    prefill: PrefillAttention | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Exact softmax attention of every query row over the blocks chosen for its KV head.

    Query head n reads KV head `n // (num_q_heads / num_kv_heads)`. Within the chosen blocks a row
    sees the keys up to its own position; nothing else is read into its result, whatever it holds.
    The ids of a row are a set: their order does not matter, an id given twice counts once, and
    ids which are negative or name no visible block are ignored.

    Parameters
    ----------
    q : [T, num_q_heads, head_dim], any strides with a contiguous last dimension
    k_pages, v_pages : [P, num_kv_heads, page_size, head_dim], one dtype, any strides with a
        contiguous last dimension; float8_e4m3fn and float8_e5m2 are read by "triton" and
        "reference" only
    block_ids : int32 [num_kv_heads, T, topk]
    page_table : int32 [R, max_pages], must cover every sequence
    cu_seqlens_q : int32 [R + 1], never decreasing, from 0 to at most T
    seq_lens : int32 [R], the step's own tokens included
    scale : factor of the dot products, head_dim ** -0.5 for M3
    k_scale, v_scale : fp32 [1] or [num_kv_heads], what a stored key or value is multiplied with;
        read by "triton" and "reference" only; None is 1
    out : [T, num_q_heads, head_dim] of q's dtype, filled when given
    lse : fp32 [T, num_q_heads], filled with the natural log of the sum of exponentials when given
    plan : the step's, read by "triton" only; without one it makes its own, which waits for the
        device and allocates
    workspace : of `allocate_sparse_attention_workspace`, used by "triton" only; None allocates
    prefill : computes the requests of more than 8 rows in the place of the prefill kernel; used by
        "triton" only; `block_ids` must be as `index_topk` leaves them then
    backend : an implementation by name, or "auto" for the best one here

    Returns
    -------
    [T, num_q_heads, head_dim] of q's dtype. Rows without a valid key, padding rows among them,
    are 0 and their lse is -inf.

    Raises
    ------
    TypeError : a dtype is not in the contract
    ValueError : a shape, device or layout is not in the contract
    IndexError : a chosen block has a page outside the pool (CPU implementations only)
    NotImplementedError : nothing can run on this device, or not with these dtypes; the reason and
        the alternative are in the message
    """
    device = q.device
    validation.require_float("q", q)
    if k_pages.dtype not in validation.FP8_DTYPES:
        validation.require_float("k_pages", k_pages)
    validation.require_dtype("v_pages", v_pages, k_pages.dtype)
    validation.require_dtype("block_ids", block_ids, torch.int32)
    words = "[T, num_q_heads, head_dim]"
    validation.require_shape("q", q, (None, None, None), words)
    rows, q_heads, dim = q.shape
    pool = "[P, num_kv_heads, page_size, head_dim]"
    validation.require_shape("k_pages", k_pages, (None, None, None, dim), pool)
    validation.require_shape("v_pages", v_pages, tuple(k_pages.shape), pool)
    kv_heads = k_pages.shape[1]
    if kv_heads == 0 or q_heads % kv_heads != 0:
        raise ValueError(f"q must have a multiple of the {kv_heads} KV heads; got {q_heads} heads")
    ids = "[num_kv_heads, T, topk]"
    validation.require_shape("block_ids", block_ids, (kv_heads, rows, None), ids)
    validation.require_dense_rows("q", q)
    validation.require_dense_rows("k_pages", k_pages)
    validation.require_dense_rows("v_pages", v_pages)
    validation.require_dense_rows("block_ids", block_ids)
    validation.require_device("k_pages", k_pages, device)
    validation.require_device("v_pages", v_pages, device)
    validation.require_device("block_ids", block_ids, device)
    validation.require_batch(
        page_table=page_table, cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens, device=device
    )
    _require_scale("k_scale", k_scale, kv_heads, device)
    _require_scale("v_scale", v_scale, kv_heads, device)
    if out is None:
        out = torch.empty(rows, q_heads, dim, dtype=q.dtype, device=device)
    else:
        validation.require_dtype("out", out, q.dtype)
        validation.require_shape("out", out, (rows, q_heads, dim), words)
        validation.require_dense_rows("out", out)
        validation.require_device("out", out, device)
    if lse is not None:
        validation.require_dtype("lse", lse, torch.float32)
        validation.require_shape("lse", lse, (rows, q_heads), "[T, num_q_heads]")
        validation.require_device("lse", lse, device)

    implementation = implementation_for(
        "sparse_attention", backend=backend, device_type=device.type
    )
    scaled = k_scale is not None or v_scale is not None
    if implementation in ("native", "torch") and (scaled or k_pages.dtype in validation.FP8_DTYPES):
        raise NotImplementedError(
            f"sparse_attention: backend {implementation!r} reads float32, bfloat16 and float16 "
            f"pages without scales; got {k_pages.dtype}{' and scales' if scaled else ''}. Keep KV "
            f"in one of these on a CPU, or ask for backend='reference'"
        )
    if implementation == "triton":
        from m3_kernels.sparse_attention.triton import sparse_attention_triton

        sparse_attention_triton(
            q,
            k_pages,
            v_pages,
            block_ids,
            page_table=page_table,
            cu_seqlens_q=cu_seqlens_q,
            seq_lens=seq_lens,
            scale=scale,
            out=out,
            lse=lse,
            k_scale=k_scale,
            v_scale=v_scale,
            plan=plan,
            workspace=workspace,
            prefill=prefill,
        )
        return out
    if implementation == "native":
        from m3_kernels.sparse_attention.native import sparse_attention_native as run
    elif implementation == "torch":
        from m3_kernels.sparse_attention.torch_cpu import sparse_attention_torch as run
    else:
        from m3_kernels.sparse_attention.reference import sparse_attention_reference as run

        k_pages = dequantised(k_pages, k_scale)
        v_pages = dequantised(v_pages, v_scale)
    run(
        q,
        k_pages,
        v_pages,
        block_ids,
        page_table=page_table,
        cu_seqlens_q=cu_seqlens_q,
        seq_lens=seq_lens,
        scale=scale,
        out=out,
        lse=lse,
    )
    return out


def dequantised(pages: Tensor, scale: Tensor | None) -> Tensor:
    """The keys or values that stored ones stand for; fp32 if a scale is given."""
    return pages if scale is None else pages.float() * scale[:, None, None]


def _require_scale(name: str, scale: Tensor | None, kv_heads: int, device: torch.device) -> None:
    if scale is None:
        return
    validation.require_dtype(name, scale, torch.float32)
    size = 1 if scale.numel() == 1 else kv_heads
    validation.require_shape(name, scale, (size,), "[1] or [num_kv_heads]")
    validation.require_dense_rows(name, scale)
    validation.require_device(name, scale, device)
