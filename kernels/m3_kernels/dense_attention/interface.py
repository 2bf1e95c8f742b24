"""Contract, validation and dispatch of `dense_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from m3_kernels import validation
from m3_kernels.capability import Backend, implementation_for


def dense_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    scale: float,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Exact causal softmax attention of every query row over its whole context, on a CPU.

    Query head n reads KV head `n // (num_q_heads / num_kv_heads)`. A row sees the keys up to its
    own position; nothing else is read into its result, whatever it holds.

    Parameters
    ----------
    q : [T, num_q_heads, head_dim], any strides with a contiguous last dimension
    k_pages, v_pages : [P, num_kv_heads, page_size, head_dim], one dtype, any strides with a
        contiguous last dimension
    page_table : int32 [R, max_pages], must cover every sequence
    cu_seqlens_q : int32 [R + 1], never decreasing, from 0 to at most T
    seq_lens : int32 [R], the step's own tokens included
    scale : factor of the dot products, head_dim ** -0.5 for M3
    out : [T, num_q_heads, head_dim] of q's dtype, filled when given
    lse : fp32 [T, num_q_heads], filled with the natural log of the sum of exponentials when given
    backend : an implementation by name, or "auto" for the best one here

    Returns
    -------
    [T, num_q_heads, head_dim] of q's dtype. Rows without a key, padding rows among them, are 0 and
    their lse is -inf.

    Raises
    ------
    TypeError : a dtype is not in the contract
    ValueError : a shape, device or layout is not in the contract
    IndexError : a visible block has a page outside the pool
    NotImplementedError : nothing can run on this device; the reason is in the message
    """
    device = q.device
    validation.require_float("q", q)
    validation.require_float("k_pages", k_pages)
    validation.require_dtype("v_pages", v_pages, k_pages.dtype)
    words = "[T, num_q_heads, head_dim]"
    validation.require_shape("q", q, (None, None, None), words)
    rows, q_heads, dim = q.shape
    pool = "[P, num_kv_heads, page_size, head_dim]"
    validation.require_shape("k_pages", k_pages, (None, None, None, dim), pool)
    validation.require_shape("v_pages", v_pages, tuple(k_pages.shape), pool)
    kv_heads = k_pages.shape[1]
    if kv_heads == 0 or q_heads % kv_heads != 0:
        raise ValueError(f"q must have a multiple of the {kv_heads} KV heads; got {q_heads} heads")
    for name, tensor in (("q", q), ("k_pages", k_pages), ("v_pages", v_pages)):
        validation.require_dense_rows(name, tensor)
        validation.require_device(name, tensor, device)
    validation.require_batch(
        page_table=page_table, cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens, device=device
    )
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

    implementation = implementation_for("dense_attention", backend=backend, device_type=device.type)
    if implementation == "triton":
        raise NotImplementedError(
            "dense_attention computes on CPU tensors in C++ or plain torch; on a GPU a host's own "
            "kernels attend in dense layers"
        )
    if implementation == "native":
        from m3_kernels.dense_attention.native import dense_attention_native as run
    elif implementation == "torch":
        from m3_kernels.dense_attention.torch_cpu import dense_attention_torch as run
    else:
        from m3_kernels.dense_attention.reference import dense_attention_reference as run
    run(
        q,
        k_pages,
        v_pages,
        page_table=page_table,
        cu_seqlens_q=cu_seqlens_q,
        seq_lens=seq_lens,
        scale=scale,
        out=out,
        lse=lse,
    )
    return out
