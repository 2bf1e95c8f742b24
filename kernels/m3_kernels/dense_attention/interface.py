"""Contract and implementations of `dense_attention`."""

from __future__ import annotations

from torch import Tensor

from m3_kernels.capability import Backend
from m3_kernels.dense_attention.call import DenseAttention
from m3_kernels.implementations import Op, Runs
from m3_kernels.paged import NO_FP8, KVPages, Step

# No "triton": on a GPU a host's own kernels attend in dense layers.
DENSE_ATTENTION = Op[DenseAttention](
    "dense_attention",
    {
        "native": Runs("native:dense_attention_native", NO_FP8),
        "torch": Runs("torch_cpu:dense_attention_torch", NO_FP8),
        "reference": Runs("reference:dense_attention_reference", NO_FP8),
    },
)


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
    call = DenseAttention(
        q,
        KVPages(k_pages, v_pages),
        Step(page_table, cu_seqlens_q, seq_lens),
        scale,
        out=q.new_empty(q.shape) if out is None else out,
        lse=lse,
    )
    DENSE_ATTENTION.run(call, backend=backend)
    return call.out
