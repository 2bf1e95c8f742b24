"""MSASession: the one order of operations of MiniMax sparse attention, for every host.

plan(batch)                      once per engine step, outside any graph capture
run(plan, q, k, v, ...)          once per sparse layer, device work only; may be captured
    norm_rope_store              heads normalised and rotated; K, V and index keys into their pages
    index_topk                   the best blocks per query row and GQA group
    sparse_attention             exact attention over those blocks
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from m3_kernels.cache_store import CACHE_STORE, CacheStore
from m3_kernels.cache_store.nvfp4 import nvfp4_index_keys, nvfp4_values
from m3_kernels.index_merge import INDEX_MERGE, IndexMerge
from m3_kernels.index_topk import INDEX_CANDIDATES, INDEX_TOPK, BlockShare, IndexTopk
from m3_kernels.norm_rope_store import NORM_ROPE_STORE, HeadNorms, NormRopeStore
from m3_kernels.paged import MSACaches, Step
from m3_kernels.sparse_attention import (
    SPARSE_ATTENTION,
    PrefillAttention,
    SparseAttention,
    flashinfer_prefill,
    pages_refusal,
)
from m3_kernels.work_plan import WorkPlan
from m3_plugin.attention.backends import KernelChoice
from m3_plugin.attention.batch import MSABatch
from m3_plugin.attention.sharing import Candidates, IndexSharing
from m3_plugin.attention.workspace import Workspace
from m3_plugin.model.config import MSAConfig

if TYPE_CHECKING:
    from m3_plugin.attention.recorder import SelectionRecorder

logger = logging.getLogger(__name__)

NOT_TIMED = nullcontext()


@dataclass(frozen=True)
class MSAPlan:
    """What one step's layers share. Nothing derived from a top-k may live here.

    Attributes
    ----------
    step : the batch's lengths and page table, as the ops take them
    work : how the Triton kernels divide the step; None for the families that need no plan
    share : the blocks that this rank scans; None where each rank scans all for its own heads
    """

    batch: MSABatch
    step: Step
    work: WorkPlan | None = None
    share: BlockShare | None = None


@dataclass
class MSAStatistics:
    """How much of the context the sparse layers really read, summed over layers.

    `rows` counts (query row, layer) pairs; `blocks_read` the blocks chosen and `blocks_visible` the
    blocks dense layers would have read, both summed over the groups of those rows. `decode_*` hold
    the part of steps in which no request had more than one row.
    """

    rows: int = 0
    blocks_read: int = 0
    blocks_visible: int = 0
    decode_rows: int = 0
    decode_blocks_read: int = 0
    decode_blocks_visible: int = 0

    def add(self, block_ids: Tensor, *, batch: MSABatch, block_size: int) -> None:
        """Count one layer's selection; reads its values, so it is for CPU tensors.

        Parameters
        ----------
        block_ids : int32 [num_kv_heads, rows, topk], -1 where nothing was chosen
        """
        q_lens = batch.cu_seqlens_q.diff()
        rows = int(batch.cu_seqlens_q[-1])
        request = torch.repeat_interleave(torch.arange(batch.num_reqs), q_lens)
        position = batch.seq_lens[request] - batch.cu_seqlens_q[1:][request] + torch.arange(rows)
        visible = int((position // block_size + 1).sum()) * block_ids.shape[0]
        read = int((block_ids[:, :rows] >= 0).sum())
        self.rows += rows
        self.blocks_read += read
        self.blocks_visible += visible
        if batch.phase == "decode":
            self.decode_rows += rows
            self.decode_blocks_read += read
            self.decode_blocks_visible += visible

    def phase(self, name: str) -> dict[str, int]:
        """rows, blocks_read and blocks_visible of "decode", or of all other steps ("prefill")."""
        decode = {
            "rows": self.decode_rows,
            "blocks_read": self.decode_blocks_read,
            "blocks_visible": self.decode_blocks_visible,
        }
        if name == "decode":
            return decode
        return {key: getattr(self, key) - value for key, value in decode.items()}


class LayerChecker(Protocol):
    """Looks at layers as they run (`m3_plugin.attention.checks`).

    Attributes
    ----------
    names : how the host calls the requests of the step that runs now
    """

    names: Callable[[], Sequence[str]]

    def replanned(self) -> None:
        """The lengths of the last plan have changed in place: another step."""
        ...

    def before(self, plan: MSAPlan, *, caches: MSACaches) -> None:
        """A layer is about to store; raises where it must not."""
        ...

    def after(
        self, plan: MSAPlan, q: Tensor, block_ids: Tensor, out: Tensor, *, caches: MSACaches
    ) -> None:
        """A layer has run; raises where its result must not be used."""
        ...

    def together(self, plan: MSAPlan, block_ids: Tensor, alone: Callable[[], Tensor]) -> None:
        """Ranks have chosen together; raises where this one would choose otherwise `alone`."""
        ...

    def end(self, hidden: Tensor) -> None:
        """The model has run; raises where what it gave, [rows, hidden size], must not be used."""
        ...


class LooksAtTransfers(Protocol):
    """Knows rows of caches that came from elsewhere (`m3_plugin.attention.transfers`)."""

    def look(self, plan: MSAPlan, *, caches: MSACaches) -> None:
        """A layer has stored and is about to read; raises where it must not."""
        ...


class MSASession:
    """Runs MSA for the layers of one worker; owns whatever outlives a step, shares nothing.

    Parameters
    ----------
    msa : block selection rules of the model
    kernels : the kernel family and the reason for it (`backends.choose_kernels`)
    scale : softmax scale of the main branch, head_dim ** -0.5 for M3
    workspace : memory of the "triton" family, which needs one; None for all others
    nvfp4 : whether K, V and index keys are rounded to NVFP4 before they are stored
    sharing : how scans are shared out over ranks, each of which is then given the index queries of
        all heads; None where it has those of its own

    Raises
    ------
    ValueError : the family needs a workspace and has none, or the other way round.
    """

    def __init__(
        self,
        msa: MSAConfig,
        *,
        kernels: KernelChoice,
        scale: float,
        workspace: Workspace | None = None,
        nvfp4: bool = False,
        sharing: IndexSharing | None = None,
    ) -> None:
        if (kernels.family == "triton") != (workspace is not None):
            raise ValueError(
                f"a session needs a workspace exactly if its kernels are 'triton'; got "
                f"{kernels.family!r} {'without' if workspace is None else 'with'} one"
            )
        self.msa = msa
        self.kernels = kernels
        self.scale = scale
        self.workspace = workspace
        self.nvfp4 = nvfp4
        self.sharing = sharing
        self._store = NORM_ROPE_STORE.bound(kernels.family)
        self._put = CACHE_STORE.bound(kernels.family)
        self._select = INDEX_TOPK.bound(kernels.family)
        if sharing is not None:
            self._scan = INDEX_CANDIDATES.bound(kernels.family)
            self._merge = INDEX_MERGE.bound(kernels.family)
        self._attend = SPARSE_ATTENTION.bound(kernels.family)
        # layouts of pages on which every kernel was run (`m3_plugin.attention.warm_up`)
        self.warmed: set[tuple[object, ...]] = set()
        # off by default because counting costs time
        self.statistics: MSAStatistics | None = None
        self.recorder: SelectionRecorder | None = None
        self.checker: LayerChecker | None = None
        self.transfers: LooksAtTransfers | None = None

    def plan(self, batch: MSABatch) -> MSAPlan:
        """Prepare one engine step. May look at host integers, never at device values.

        With a workspace this writes the plan on the device, over the previous step's. A graph that
        was captured with an earlier plan of as many requests and rows then replays this step.

        Raises
        ------
        ValueError : the step is larger than the workspace.
        """
        work = None if self.workspace is None else self.workspace.plan(batch)
        step = Step(batch.page_table, batch.cu_seqlens_q, batch.seq_lens)
        share = None
        if self.sharing is not None and self.sharing.takes(batch):
            share = self.sharing.share(batch, page_size=self.msa.block_size)
        return MSAPlan(batch=batch, step=step, work=work, share=share)

    def replan(self, plan: MSAPlan) -> None:
        """Plan a step again after its lengths have changed in place, as they do while drafting.

        Writes where the plan lies and looks at nothing on the host, so that a graph may hold it.
        """
        if self.workspace is not None:
            self.workspace.plan(plan.batch)
        if self.sharing is not None and plan.share is not None:
            plan.share.become(self.sharing.share(plan.batch, page_size=self.msa.block_size))
        if self.checker is not None:
            self.checker.replanned()

    def run(
        self,
        plan: MSAPlan,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index_q: Tensor,
        index_k: Tensor,
        *,
        norms: HeadNorms,
        cos_sin: Tensor,
        caches: MSACaches,
        out: Tensor,
    ) -> None:
        """Normalise and rotate heads, store the step's keys and attend, for one sparse layer.

        Parameters
        ----------
        q, k, v, index_q, index_k, norms, cos_sin, caches : as in `store`
        out : [rows, num_q_heads, head_dim], filled in place; padding rows become zero
        """
        if self.checker is not None:
            self.checker.before(plan, caches=caches)
        with self.timed("store", plan):
            q, index_q = self.store(
                plan, q, k, v, index_q, index_k, norms=norms, cos_sin=cos_sin, caches=caches
            )
        if self.transfers is not None:
            self.transfers.look(plan, caches=caches)
        with self.timed("select", plan):
            block_ids = self.select(plan, index_q, caches=caches)
        # plain torch rounds scores by the shape of a call, so that near ties may fall otherwise
        compared = plan.share is not None and self.kernels.family != "torch"
        if self.checker is not None and compared:
            own = replace(plan, share=None)
            alone = partial(self.select, own, index_q, caches=caches)
            self.checker.together(plan, block_ids, alone)
        with self.timed("attend", plan):
            self.attend(plan, q, block_ids, caches=caches, out=out)
        if self.checker is not None:
            self.checker.after(plan, q, block_ids, out, caches=caches)
        if self.statistics is not None:
            self.statistics.add(block_ids, batch=plan.batch, block_size=self.msa.block_size)
        if self.recorder is not None:
            self.recorder.add(block_ids, batch=plan.batch)

    def timed(self, part: str, plan: MSAPlan) -> AbstractContextManager[None]:
        """Around each part of `run`, for sessions that report how long it takes; here nothing."""
        return NOT_TIMED

    def store(
        self,
        plan: MSAPlan,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index_q: Tensor,
        index_k: Tensor,
        *,
        norms: HeadNorms,
        cos_sin: Tensor,
        caches: MSACaches,
    ) -> tuple[Tensor, Tensor]:
        """First part of `run`: norm and RoPE; keys, values and index keys into their pages.

        Parameters
        ----------
        q : [rows, num_q_heads, head_dim], as projected; rows may be parts of a wider tensor
        k, v : [rows, num_kv_heads, head_dim]
        index_q : [rows, num_index_heads, index_dim]; of all ranks' heads where scans are shared
        index_k : [rows, index_dim]
        norms : the layer's
        cos_sin : floating [rows, rotary_dim], cosines and then sines of the rows' angles
            (`m3_plugin.model.rope.RowAngles`)
        caches : the layer's pages; written at the batch's slots

        Returns
        -------
        q and index_q, normalised and rotated; with a workspace they lie in it until the next layer
        """
        rows = q.shape[0]
        scratch = self.workspace.scratch if self.workspace else None
        stored = CacheStore(k, v, index_k, caches, plan.batch.slot_mapping)
        call = NormRopeStore(
            q,
            index_q,
            _beside(stored) if self.nvfp4 else stored,
            norms,
            cos_sin,
            q_out=scratch.q[:rows] if scratch else torch.empty_like(q),
            index_q_out=scratch.index_q[:rows] if scratch else torch.empty_like(index_q),
        )
        self._store(call)
        if self.nvfp4:
            self._put(_in_nvfp4(call.stored.caches, stored))
        return call.q_out, call.index_q_out

    def select(self, plan: MSAPlan, index_q: Tensor, *, caches: MSACaches) -> Tensor:
        """Second part of `run`: the blocks to read, int32 [num_kv_heads, rows, topk].

        Parameters
        ----------
        index_q : as `store` returns it
        """
        if self.sharing is not None:
            if plan.share is not None:
                return self._select_together(plan, plan.share, index_q, caches=caches)
            index_q = index_q[:, self.sharing.own_heads]
        rows, heads, _ = index_q.shape
        shape = (heads, rows, self.msa.topk_blocks)
        call = IndexTopk(
            index_q,
            caches.index,
            plan.step,
            topk=self.msa.topk_blocks,
            num_local_blocks=self.msa.num_local_blocks,
            num_init_blocks=self.msa.num_init_blocks,
            out=(
                self.workspace.ids(rows)
                if self.workspace
                else index_q.new_empty(shape, dtype=torch.int32)
            ),
            plan=plan.work,
            workspace=self.workspace.scratch.scores if self.workspace else None,
        )
        self._select(call)
        return call.out

    def _select_together(
        self, plan: MSAPlan, share: BlockShare, index_q: Tensor, *, caches: MSACaches
    ) -> Tensor:
        """As `select`, each rank scanning its share of the blocks for the index heads of all."""
        assert self.sharing is not None
        rows, heads, _ = index_q.shape
        topk = self.msa.topk_blocks
        own = Candidates.empty(index_q, num_index_heads=heads, rows=rows, topk=topk)
        self._scan(
            IndexTopk(
                index_q,
                caches.index,
                plan.step,
                topk=topk,
                num_local_blocks=self.msa.num_local_blocks,
                num_init_blocks=self.msa.num_init_blocks,
                out=own.ids,
                share=share,
                scores=own.scores,
            )
        )
        found = self.sharing.exchange(own)
        call = IndexMerge(
            found.ids,
            found.scores,
            plan.step.cu_seqlens_q,
            plan.step.seq_lens,
            page_size=self.msa.block_size,
            num_local_blocks=self.msa.num_local_blocks,
            num_init_blocks=self.msa.num_init_blocks,
            out=index_q.new_empty(found.ids.shape[1:], dtype=torch.int32),
        )
        self._merge(call)
        return call.out

    def attend(
        self, plan: MSAPlan, q: Tensor, block_ids: Tensor, *, caches: MSACaches, out: Tensor
    ) -> None:
        """Third part of `run`: attention over the chosen blocks, into `out`.

        Parameters
        ----------
        q : as `store` returns it
        """
        call = SparseAttention(
            q,
            caches.kv,
            block_ids,
            plan.step,
            self.scale,
            out=out,
            plan=plan.work,
            workspace=self.workspace.scratch.attention if self.workspace else None,
            prefill=self._prefill(caches),
        )
        self._attend(call)

    def _prefill(self, caches: MSACaches) -> PrefillAttention | None:
        """FlashInfer's prefill, or None to use our own kernel.

        Never FlashInfer within a capture, in which it was not tried. A page layout that it cannot
        read ends its use, for all layers of a session have the same.
        """
        if self.kernels.prefill is None or _is_captured(caches.k_pages.device):
            return None
        reason = pages_refusal(caches.k_pages, caches.v_pages)
        if reason is not None:
            self.kernels = self.kernels.without_flashinfer(reason)
            logger.warning("m3-plugin: MSA kernels: %s", self.kernels.describe())
            return None
        return flashinfer_prefill


def _beside(stored: CacheStore) -> CacheStore:
    """The same keys and values, one token to a page of a pool of this step's own."""
    k, v, index_k = stored.k, stored.v, stored.index_k
    rows, heads, dim = k.shape
    pages = MSACaches(
        k.new_empty(rows, heads, 1, dim),
        v.new_empty(rows, heads, 1, dim),
        index_k.new_empty(rows, 1, index_k.shape[-1]),
    )
    slots = torch.arange(rows, dtype=torch.int64, device=k.device)
    return CacheStore(k, v, index_k, pages, slots)


def _in_nvfp4(made: MSACaches, stored: CacheStore) -> CacheStore:
    """What goes into the served pages: what was made of keys and values, rounded to NVFP4."""
    k, v, index_k = stored.k, stored.v, stored.index_k
    return CacheStore(
        nvfp4_values(made.k_pages.squeeze(2)).to(k.dtype),
        nvfp4_values(made.v_pages.squeeze(2)).to(v.dtype),
        nvfp4_index_keys(made.index_k_pages.squeeze(1)).to(index_k.dtype),
        stored.caches,
        stored.slot_mapping,
    )


def _is_captured(device: torch.device) -> bool:
    """Whether launches go into a CUDA graph now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
