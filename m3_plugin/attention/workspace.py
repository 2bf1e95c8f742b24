"""Memory a session on a GPU owns: allocated once, for the largest step, at addresses that stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from m3_kernels.index_topk.workspace import allocate_index_topk_workspace
from m3_kernels.sparse_attention import (
    SparseAttentionWorkspace,
    allocate_sparse_attention_workspace,
)
from m3_kernels.tuning import arch_of
from m3_kernels.work_plan import WorkPlan, WorkPlanBuffers, allocate_work_plan, fill_work_plan
from m3_plugin.attention.batch import MSABatch, StepCapacity
from m3_plugin.model.config import MSAConfig


@dataclass(frozen=True)
class LayerShape:
    """One sparse layer on one rank.

    Attributes
    ----------
    rotary_dim : channels of every head that RoPE rotates
    dtype : of activations
    cache_dtype : of K and V pages
    index_dtype : of index-key pages
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    dtype: torch.dtype
    cache_dtype: torch.dtype
    index_dtype: torch.dtype


@dataclass(frozen=True)
class Scratch:
    """What the layer that is running writes and reads: nothing in it outlives the layer.

    Sessions whose layers run one after another on one stream, as a target's and its draft's do,
    share one.

    Attributes
    ----------
    scores : fp32, block scores of `index_topk`
    block_ids : int32 [num_kv_heads * max_rows * topk]
    q, index_q : [max_rows, heads, dim], after norm and RoPE
    """

    scores: Tensor
    attention: SparseAttentionWorkspace
    block_ids: Tensor
    q: Tensor
    index_q: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of it."""
        partial, arrivals = self.attention.partial, self.attention.arrivals
        return (self.scores, partial, arrivals, self.block_ids, self.q, self.index_q)

    def serves(self, other: Scratch) -> bool:
        """Whether it can stand in for another, which may be of meta tensors."""
        return all(
            mine.dtype == theirs.dtype
            and mine.shape[1:] == theirs.shape[1:]
            and mine.shape[0] >= theirs.shape[0]
            for mine, theirs in zip(self.tensors, other.tensors, strict=True)
        )


@dataclass(frozen=True)
class Workspace:
    """Plan and scratch of the Triton kernels, shared by all layers of a session.

    One step at a time: layers run one after another on one stream.

    Attributes
    ----------
    shape : of the session's layers
    scratch : the session's own, or another session's
    shared : whether it is another session's
    """

    capacity: StepCapacity
    page_size: int
    topk: int
    shape: LayerShape
    plan_buffers: WorkPlanBuffers
    scratch: Scratch
    shared: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes allocated for this session, plan included and another's scratch left out."""
        tensors = [*vars(self.plan_buffers).values()]
        if not self.shared:
            tensors += self.scratch.tensors
        return sum(tensor.nbytes for tensor in tensors)

    def describe(self) -> str:
        """One clause for a log: the size and what it is for."""
        c = self.capacity
        beside = ", beside the target's, which it shares" if self.shared else ""
        return (
            f"workspace {self.num_bytes / 2**20:.0f} MiB for {c.max_requests} requests, "
            f"{c.max_rows} rows, {c.max_seq_len} tokens{beside}"
        )

    def plan(self, batch: MSABatch) -> WorkPlan:
        """Divide the step's work, on the device and without waiting for it.

        Raises
        ------
        ValueError : the step is larger than the capacity.
        """
        self.capacity.require(batch)
        # Kernels leave zeros. Yet memory may have been dropped and mapped anew since the last step
        # (a server that slept), or a launch may have been cut off.
        self.scratch.attention.arrivals.zero_()
        return fill_work_plan(
            self.plan_buffers,
            cu_seqlens_q=batch.cu_seqlens_q,
            seq_lens=batch.seq_lens,
            num_rows=batch.slot_mapping.shape[0],
            max_query_len=batch.max_query_len,
            max_seq_len=batch.max_seq_len,
            page_size=self.page_size,
            decode_rows=self.capacity.decode_rows,
            backend="triton",
        )

    def ids(self, rows: int) -> Tensor:
        """Where a layer's selection goes: int32 [num_kv_heads, rows, topk]."""
        heads = self.shape.num_kv_heads
        return self.scratch.block_ids[: heads * rows * self.topk].view(heads, rows, self.topk)


def allocate_workspace(
    msa: MSAConfig,
    shape: LayerShape,
    capacity: StepCapacity,
    *,
    device: torch.device,
    beside: Workspace | None = None,
) -> Workspace:
    """Memory for every step within the capacity.

    Parameters
    ----------
    beside : of a session whose layers never run at the same time; its scratch is shared if it is
        large enough for this one
    """
    scratch = None
    if beside is not None:
        wanted = _allocate_scratch(
            msa, shape, capacity, device=torch.device("meta"), arch=arch_of(device)
        )
        scratch = beside.scratch if beside.scratch.serves(wanted) else None
    return Workspace(
        capacity=capacity,
        page_size=msa.block_size,
        topk=msa.topk_blocks,
        shape=shape,
        plan_buffers=allocate_work_plan(
            max_reqs=capacity.max_requests, max_rows=capacity.max_rows, device=device
        ),
        scratch=scratch or _allocate_scratch(msa, shape, capacity, device=device),
        shared=scratch is not None,
    )


def workspace_bytes(
    msa: MSAConfig, shape: LayerShape, capacity: StepCapacity, *, device: torch.device
) -> int:
    """Bytes of what `allocate_workspace` would allocate on a device, beside no other session's.

    A little less: the plan's ranges, a number for each program of the chip, are left out.
    """
    meta = torch.device("meta")
    scratch = _allocate_scratch(msa, shape, capacity, device=meta, arch=arch_of(device))
    plan = allocate_work_plan(
        max_reqs=capacity.max_requests, max_rows=capacity.max_rows, device=meta
    )
    return sum(tensor.nbytes for tensor in (*scratch.tensors, *vars(plan).values()))


def _allocate_scratch(
    msa: MSAConfig,
    shape: LayerShape,
    capacity: StepCapacity,
    *,
    device: torch.device,
    arch: int | None = None,
) -> Scratch:
    """Scratch of the largest step, with the tiles of a chip (None: the device's own)."""
    return Scratch(
        scores=allocate_index_topk_workspace(
            max_reqs=capacity.max_requests,
            max_rows=capacity.max_rows,
            max_query_len=capacity.max_rows,
            max_seq_len=capacity.max_seq_len,
            num_index_heads=shape.num_kv_heads,
            page_size=msa.block_size,
            decode_rows=capacity.decode_rows,
            device=device,
        ),
        attention=allocate_sparse_attention_workspace(
            max_reqs=capacity.max_requests,
            max_query_len=capacity.max_rows,
            num_q_heads=shape.num_q_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            page_size=msa.block_size,
            topk=msa.topk_blocks,
            dtype=shape.dtype,
            kv_dtype=shape.cache_dtype,
            decode_rows=capacity.decode_rows,
            arch=arch,
            device=device,
        ),
        block_ids=torch.empty(
            shape.num_kv_heads * capacity.max_rows * msa.topk_blocks,
            dtype=torch.int32,
            device=device,
        ),
        q=torch.empty(
            (capacity.max_rows, shape.num_q_heads, shape.head_dim),
            dtype=shape.dtype,
            device=device,
        ),
        index_q=torch.empty(
            (capacity.max_rows, shape.num_kv_heads, msa.index_dim),
            dtype=shape.dtype,
            device=device,
        ),
    )
