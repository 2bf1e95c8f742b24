"""One call of `index_topk` or `index_candidates`, checked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from m3_kernels import validation
from m3_kernels.index_topk.share import BlockShare
from m3_kernels.paged import IndexPages, Step
from m3_kernels.work_plan import WorkPlan


@dataclass(frozen=True)
class IndexTopk:
    """All that an implementation of `index_topk` gets; the public function says what it means.

    Attributes
    ----------
    index_q : [T, num_index_heads, index_dim], any strides with a contiguous last dimension
    keys : index keys [P, page_size, index_dim], and their scales where there are any
    step : the step's lengths and page table
    topk : number of ids per row and head, at least 1
    num_local_blocks, num_init_blocks : newest and first blocks that are always chosen
    out : int32 [num_index_heads, T, topk], filled
    share : the blocks that are scanned, of a call of `index_candidates`; None for all
    scores : fp32, as `out`, filled; with a share and only then
    plan : the step's, for "triton"; None makes one, which waits for the device and allocates
    workspace : fp32 [N] of `allocate_index_topk_workspace`, for "triton"; None allocates

    Raises
    ------
    TypeError : a dtype is not in the contract
    ValueError : a shape, device, layout or count is not in the contract
    """

    index_q: Tensor
    keys: IndexPages
    step: Step
    topk: int
    num_local_blocks: int
    num_init_blocks: int
    out: Tensor
    plan: WorkPlan | None = None
    workspace: Tensor | None = None
    share: BlockShare | None = None
    scores: Tensor | None = None

    def __post_init__(self) -> None:
        device = self.device
        if self.topk < 1:
            raise ValueError(f"topk must be at least 1; got {self.topk}")
        if self.num_local_blocks < 0:
            raise ValueError(f"num_local_blocks must not be negative; got {self.num_local_blocks}")
        if self.num_init_blocks < 0:
            raise ValueError(f"num_init_blocks must not be negative; got {self.num_init_blocks}")
        words = "[T, num_index_heads, index_dim]"
        validation.require_float("index_q", self.index_q)
        validation.require_shape("index_q", self.index_q, (None, None, None), words)
        validation.require_dense_rows("index_q", self.index_q)
        rows, heads, dim = self.index_q.shape
        pages, words = self.keys.index_k_pages, "[P, page_size, index_dim]"
        validation.require_shape("index_k_pages", pages, (None, None, dim), words)
        validation.require_device("index_k_pages", pages, device)
        self.step.require_device(device)
        validation.require_dtype("out", self.out, torch.int32)
        words = "[num_index_heads, T, topk]"
        validation.require_shape("out", self.out, (heads, rows, self.topk), words)
        validation.require_dense_rows("out", self.out)
        validation.require_device("out", self.out, device)
        self._require_share()
        if self.plan is not None:
            self.plan.require_step(self.step.num_reqs, rows, pages.shape[1])
        if self.workspace is not None:
            validation.require_dtype("workspace", self.workspace, torch.float32)
            validation.require_shape("workspace", self.workspace, (None,), "[N]")
            validation.require_dense_rows("workspace", self.workspace)
            validation.require_device("workspace", self.workspace, device)

    def _require_share(self) -> None:
        if (self.share is None) != (self.scores is None):
            raise ValueError("share and scores must be given together; got one of them")
        if self.share is None or self.scores is None:
            return
        requests = (self.step.num_reqs,)
        validation.require_shape("share.first", self.share.first, requests, "[R]")
        validation.require_device("share.first", self.share.first, self.device)
        validation.require_dtype("scores", self.scores, torch.float32)
        words = "[num_index_heads, T, topk]"
        validation.require_shape("scores", self.scores, tuple(self.out.shape), words)
        validation.require_dense_rows("scores", self.scores)
        validation.require_device("scores", self.scores, self.device)

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.index_q.device

    @property
    def pages(self) -> tuple[IndexPages, ...]:
        """What it reads of caches."""
        return (self.keys,)
