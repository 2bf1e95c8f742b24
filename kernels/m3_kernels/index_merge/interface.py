"""Contract and implementations of `index_merge`."""

from __future__ import annotations

from torch import Tensor

from m3_kernels.capability import Backend
from m3_kernels.implementations import Op, Runs
from m3_kernels.index_merge.call import IndexMerge

INDEX_MERGE = Op[IndexMerge](
    "index_merge",
    {
        "native": Runs("native:index_merge_native"),
        "torch": Runs("torch_cpu:index_merge_torch"),
        "reference": Runs("reference:index_merge_reference"),
    },
)


def index_merge(
    ids: Tensor,
    scores: Tensor,
    *,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    page_size: int,
    num_local_blocks: int = 1,
    num_init_blocks: int = 0,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The best blocks among the candidates of all ranks, each of which scanned a share.

    If the shares together hold every block, these are the blocks that `index_topk` chooses from
    the same scores: a rank keeps `topk` candidates, so none of the best is missing, and they are
    ranked by the same total order.

    Parameters
    ----------
    ids : int32 [ranks, num_index_heads, T, topk], each block at most once, in any order; negative
        where there is none
    scores : fp32, as `ids`; a NaN counts as -inf
    cu_seqlens_q, seq_lens : of the step, as in `index_topk`
    page_size : tokens of a block
    num_local_blocks, num_init_blocks : as in `index_topk`
    out : int32 [num_index_heads, T, topk], filled when given
    backend : an implementation by name, or "auto" for the best one here

    Returns
    -------
    int32 [num_index_heads, T, topk]; ids ascending, then -1. Padding rows and rows at a negative
    position hold -1 only.

    Raises
    ------
    TypeError : a dtype is not in the contract
    ValueError : a shape, device, layout or count is not in the contract
    NotImplementedError : nothing can run on this device; the reason is in the message
    """
    if out is None:
        out = ids.new_empty(ids.shape[1:])
    call = IndexMerge(
        ids,
        scores,
        cu_seqlens_q,
        seq_lens,
        page_size=page_size,
        num_local_blocks=num_local_blocks,
        num_init_blocks=num_init_blocks,
        out=out,
    )
    INDEX_MERGE.run(call, backend=backend)
    return out
