"""Contract and implementations of `sparse_attention`."""

from __future__ import annotations

from torch import Tensor

from m3_kernels.capability import Backend
from m3_kernels.implementations import Op, Runs
from m3_kernels.paged import NO_FP8, KVPages, Step
from m3_kernels.sparse_attention.call import PrefillAttention, SparseAttention
from m3_kernels.sparse_attention.workspace import SparseAttentionWorkspace
from m3_kernels.work_plan import WorkPlan

SPARSE_ATTENTION = Op[SparseAttention](
    "sparse_attention",
    {
        "native": Runs("native:sparse_attention_native", NO_FP8),
        "torch": Runs("torch_cpu:sparse_attention_torch", NO_FP8),
        "triton": Runs("triton:sparse_attention_triton"),
        "reference": Runs("reference:sparse_attention_reference"),
    },
)


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
    prefill : computes the requests of more than 8 rows instead of the prefill kernel; used by
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
    call = SparseAttention(
        q,
        KVPages(k_pages, v_pages, k_scale, v_scale),
        block_ids,
        Step(page_table, cu_seqlens_q, seq_lens),
        scale,
        out=q.new_empty(q.shape) if out is None else out,
        lse=lse,
        plan=plan,
        workspace=workspace,
        prefill=prefill,
    )
    SPARSE_ATTENTION.run(call, backend=backend)
    return call.out
