"""One call of `sparse_attention`, checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from m3_kernels import validation
from m3_kernels.paged import KVPages, Step, require_attention
from m3_kernels.sparse_attention.workspace import SparseAttentionWorkspace
from m3_kernels.work_plan import WorkPlan


@dataclass(frozen=True)
class SparseAttention:
    """All that an implementation of `sparse_attention` gets; the public function explains it.

    Attributes
    ----------
    q : [T, num_q_heads, head_dim], any strides with a contiguous last dimension
    kv : pages [P, num_kv_heads, page_size, head_dim] of keys and of values, and their scales
    block_ids : int32 [num_kv_heads, T, topk]
    step : the step's lengths and page table
    scale : factor of the dot products
    out : [T, num_q_heads, head_dim] of q's dtype, filled
    lse : fp32 [T, num_q_heads], filled unless None
    plan : the step's, for "triton"; None makes one, which waits for the device and allocates
    workspace : of `allocate_sparse_attention_workspace`, for "triton"; None allocates
    prefill : runs for the requests of many rows instead of the prefill kernel of "triton"

    Raises
    ------
    TypeError : a dtype is not in the contract
    ValueError : a shape, device or layout is not in the contract
    """

    q: Tensor
    kv: KVPages
    block_ids: Tensor
    step: Step
    scale: float
    out: Tensor
    lse: Tensor | None = None
    plan: WorkPlan | None = None
    workspace: SparseAttentionWorkspace | None = None
    prefill: PrefillAttention | None = None

    def __post_init__(self) -> None:
        rows, kv_heads = require_attention(self.q, self.kv, self.step, out=self.out, lse=self.lse)
        ids = "[num_kv_heads, T, topk]"
        validation.require_dtype("block_ids", self.block_ids, torch.int32)
        validation.require_shape("block_ids", self.block_ids, (kv_heads, rows, None), ids)
        validation.require_dense_rows("block_ids", self.block_ids)
        validation.require_device("block_ids", self.block_ids, self.device)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.q.device

    @property
    def pages(self) -> tuple[KVPages, ...]:
        """What it reads of caches."""
        return (self.kv,)


# Attention of the requests of more than `DECODE_ROWS` rows. It gets the whole call and may write
# every row of `out` and `lse`: those of other requests and of none are written after it. The ids of
# a row are ascending with a tail of -1, as `index_topk` leaves them.
PrefillAttention = Callable[[SparseAttention], None]
