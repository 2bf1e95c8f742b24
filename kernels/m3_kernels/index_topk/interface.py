"""Contract and implementations of `index_topk`, and of `index_candidates` over a share."""

from __future__ import annotations

import torch
from torch import Tensor

from m3_kernels.capability import Backend
from m3_kernels.implementations import Op, Runs
from m3_kernels.index_topk.call import IndexTopk
from m3_kernels.index_topk.share import BlockShare
from m3_kernels.paged import NO_FP8, NO_PLANES, IndexPages, Step
from m3_kernels.work_plan import WorkPlan

INDEX_TOPK = Op[IndexTopk](
    "index_topk",
    {
        "native": Runs("native:index_topk_native", NO_FP8),
        "torch": Runs("torch_cpu:index_topk_torch", NO_FP8),
        "triton": Runs("triton:index_topk_triton", NO_PLANES),
        "reference": Runs("reference:index_topk_reference"),
    },
)
# The same for a share of the blocks, with scores beside the ids.
INDEX_CANDIDATES = Op[IndexTopk](
    "index_topk",
    {
        "native": Runs("native:index_topk_native", NO_FP8),
        "torch": Runs("torch_cpu:index_topk_torch", NO_FP8),
        "reference": Runs("reference:index_topk_reference"),
    },
)


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
    index_k_low: Tensor | None = None,
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
    index_k_low : int8 [P, page_size, index_dim], the low plane of keys whose high plane is
        index_k_pages. Query and key are then 16-bit integers, a dot product an exact one, and a
        score that number times the key's scale, each in fp32 (docs/index-planes.md)
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
    if out is None:
        # shapes are judged by the call
        shape = (*index_q.shape[1:2], *index_q.shape[:1], max(topk, 0))
        out = index_q.new_empty(shape, dtype=torch.int32)
    call = IndexTopk(
        index_q,
        IndexPages(index_k_pages, index_k_scales, index_k_low),
        Step(page_table, cu_seqlens_q, seq_lens),
        topk=topk,
        num_local_blocks=num_local_blocks,
        num_init_blocks=num_init_blocks,
        out=out,
        plan=plan,
        workspace=workspace,
    )
    INDEX_TOPK.run(call, backend=backend)
    return out


def index_candidates(
    index_q: Tensor,
    index_k_pages: Tensor,
    *,
    share: BlockShare,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    topk: int,
    num_local_blocks: int = 1,
    num_init_blocks: int = 0,
    index_k_scales: Tensor | None = None,
    index_k_low: Tensor | None = None,
    out: Tensor | None = None,
    scores: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """The best blocks of a share, with their scores: what one rank brings to `index_merge`.

    The order is that of `index_topk`, restricted to the blocks of the share; a block's score has
    the same bits as there, where the backend promises bits.

    Parameters
    ----------
    share : the blocks that are scanned (`share_of_rank`)
    scores : fp32 [num_index_heads, T, topk], filled when given
    others : as of `index_topk`

    Returns
    -------
    ids : int32 [num_index_heads, T, topk], ascending, then -1
    scores : fp32, as `ids`; -inf behind the last id, and in rows that see no more than `topk`
        blocks, which need no scores

    Raises
    ------
    As `index_topk`.
    """
    shape = (*index_q.shape[1:2], *index_q.shape[:1], max(topk, 0))
    if out is None:
        out = index_q.new_empty(shape, dtype=torch.int32)
    if scores is None:
        scores = index_q.new_empty(shape, dtype=torch.float32)
    call = IndexTopk(
        index_q,
        IndexPages(index_k_pages, index_k_scales, index_k_low),
        Step(page_table, cu_seqlens_q, seq_lens),
        topk=topk,
        num_local_blocks=num_local_blocks,
        num_init_blocks=num_init_blocks,
        out=out,
        share=share,
        scores=scores,
    )
    INDEX_CANDIDATES.run(call, backend=backend)
    return out, scores
