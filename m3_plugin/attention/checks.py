"""Looks at every n-th step while it is served, under `M3_PLUGIN_CHECK`: is it what it must be?

A host or a connector that hands over a wrong page, and memory or kernels that go bad, show as wrong
words long afterwards. Here they end the server at once, with request, layer and number.

Reads values of the device, so a server waits for each layer of a step it looks at. Steps
that a CUDA graph replays are not seen: serve eagerly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from m3_plugin.host.metrics import count_checked_step

if TYPE_CHECKING:
    from m3_kernels.paged import MSACaches
    from m3_plugin.attention.batch import MSABatch
    from m3_plugin.attention.session import MSAPlan
    from m3_plugin.model.config import MSAConfig

logger = logging.getLogger(__name__)

VARIABLE = "M3_PLUGIN_CHECK"
# (request of the step or None, what is wrong)
Fault = tuple[int | None, str]


class StepCheckError(RuntimeError):
    """A step is not what it must be; the message names request, layer, rule and value."""


@dataclass(frozen=True)
class Rows:
    """The rows of a step that belong to requests, on the host.

    Attributes
    ----------
    request : int64 [rows]
    position : int64 [rows], of the query in its request
    """

    request: Tensor
    position: Tensor

    @classmethod
    def of(cls, batch: MSABatch) -> Rows:
        """Of a batch whose row starts are in order (`batch_fault`)."""
        starts = batch.cu_seqlens_q.cpu().long()
        request = torch.repeat_interleave(torch.arange(batch.num_reqs), starts.diff())
        first = batch.seq_lens.cpu().long() - starts[1:]
        return cls(request, first[request] + torch.arange(len(request)))


def batch_fault(batch: MSABatch, *, num_pages: int, page_size: int) -> Fault | None:
    """The first thing that is wrong with a step before it runs.

    Rows are in order; each request has the pages its length needs, all within the pool, none twice,
    none at two places of two requests; each row stores where its page table says, and no other row.
    """
    return next(_batch_faults(batch, num_pages=num_pages, page_size=page_size), None)


def _batch_faults(batch: MSABatch, *, num_pages: int, page_size: int) -> Iterator[Fault]:
    starts = batch.cu_seqlens_q.cpu().long()
    slots = batch.slot_mapping.cpu().long()
    lengths = starts.diff()
    if int(starts[0]) != 0 or bool((lengths < 0).any()) or int(starts[-1]) > len(slots):
        yield None, f"rows of requests must ascend from 0 to at most {len(slots)}: {_few(starts)}"
        return
    if bool((slots < 0).all()):
        # a rehearsal of the host's: it stores nothing, and its pages belong to nobody
        return
    seq_lens = batch.seq_lens.cpu().long()
    table = batch.page_table.cpu().long()
    active = lengths > 0
    blocks = torch.where(active, -(-seq_lens // page_size), 0)
    for request in torch.nonzero(active & (seq_lens < lengths)).flatten().tolist():
        yield request, f"has {int(lengths[request])} rows and {int(seq_lens[request])} keys"
    for request in torch.nonzero(blocks > table.shape[1]).flatten().tolist():
        yield (
            request,
            f"has {int(seq_lens[request])} keys in {table.shape[1]} pages of {page_size}",
        )
    visible = torch.arange(table.shape[1]) < blocks[:, None]
    outside = visible & ((table < 0) | (table >= num_pages))
    for request, block in torch.nonzero(outside).tolist():
        yield (
            request,
            f"block {block} has page {int(table[request, block])}, the pool has {num_pages}",
        )
    if bool(outside.any()):
        return
    yield from _pages_at_two_places(table, visible, num_pages=num_pages)
    yield from _slot_faults(Rows.of(batch), slots, table, page_size=page_size)


def _pages_at_two_places(table: Tensor, visible: Tensor, *, num_pages: int) -> Iterator[Fault]:
    """A page holds keys of certain positions: shared prefixes have it at the same block."""
    request, block = torch.nonzero(visible, as_tuple=True)
    pages = table[visible]
    at = torch.full((num_pages,), -1)
    at[pages] = block
    for row in torch.nonzero(at[pages] != block).flatten().tolist()[:1]:
        yield (
            int(request[row]),
            f"page {int(pages[row])} is its block {int(block[row])}, and block "
            f"{int(at[pages[row]])} of it or of another request",
        )


def _slot_faults(rows: Rows, slots: Tensor, table: Tensor, *, page_size: int) -> Iterator[Fault]:
    own = slots[: len(rows.request)]
    page = table[rows.request, (rows.position // page_size).clamp(0, table.shape[1] - 1)]
    wanted = page * page_size + rows.position % page_size
    for row in torch.nonzero((own >= 0) & (own != wanted)).flatten().tolist()[:1]:
        yield (
            int(rows.request[row]),
            f"position {int(rows.position[row])} is stored at slot {int(own[row])}, its page table "
            f"says {int(wanted[row])}",
        )
    stored = own[own >= 0]
    if len(stored.unique()) != len(stored):
        yield None, "two rows are stored at the same slot"


def selection_fault(
    block_ids: Tensor, rows: Rows, *, msa: MSAConfig, page_size: int
) -> Fault | None:
    """The first row whose chosen blocks break the contract of `index_topk`.

    As many as the rules want, ascending, none beyond the row's own block, which is always chosen.

    Parameters
    ----------
    block_ids : int32 [groups, rows, topk]
    """
    ids = block_ids[:, : len(rows.request)].cpu().long()
    own = rows.position // page_size
    chosen = ids >= 0
    wanted = torch.clamp(own + 1, max=msa.topk_blocks)
    ascending = (ids[..., 1:] > ids[..., :-1]) | ~chosen[..., 1:]
    good = (chosen.sum(-1) == wanted) & ascending.all(-1) & (ids.amax(-1) <= own)
    # -1 comes last: as many in front as there are at all
    front = torch.arange(ids.shape[-1]) < wanted[:, None]
    good &= (chosen == front).all(-1)
    if msa.num_local_blocks > 0:
        good &= ids.amax(-1) == own
    bad = torch.nonzero(~good).tolist()
    if not bad:
        return None
    group, row = bad[0]
    return int(rows.request[row]), (
        f"group {group} at position {int(rows.position[row])} chose blocks "
        f"{ids[group, row].tolist()}; wanted are {int(wanted[row])} ascending ones up to its own, "
        f"{int(own[row])}"
    )


def sharing_fault(block_ids: Tensor, alone: Tensor, rows: Rows) -> Fault | None:
    """The first row for which ranks that share a scan choose otherwise than one that does not.

    Parameters
    ----------
    block_ids, alone : int32 [groups, rows, topk]
    """
    bad = torch.nonzero((block_ids != alone)[:, : len(rows.request)].any(-1)).tolist()
    if not bad:
        return None
    group, row = bad[0]
    return int(rows.request[row]), (
        f"group {group} at position {int(rows.position[row])} chose blocks "
        f"{block_ids[group, row].tolist()} together with other ranks, and "
        f"{alone[group, row].tolist()} alone"
    )


def output_fault(
    out: Tensor, q: Tensor, block_ids: Tensor, rows: Rows, *, batch: MSABatch, caches: MSACaches
) -> Fault | None:
    """The first row whose result is NaN or infinite, and where that came from.

    Parameters
    ----------
    out, q : [rows, heads, head_dim]
    block_ids : int32 [groups, rows, topk]
    """
    finite = torch.isfinite(out[: len(rows.request)]).flatten(1).all(-1).cpu()
    if bool(finite.all()):
        return None
    row = int(torch.nonzero(~finite)[0])
    request = int(rows.request[row])
    said = f"the result at position {int(rows.position[row])} is not finite; "
    if not bool(torch.isfinite(q[row]).all()):
        return request, said + "the query was not either: a layer before this one, or its weights"
    blocks = block_ids[:, row].flatten().unique().cpu().tolist()
    for block in (block for block in blocks if block >= 0):
        page = int(batch.page_table[request, block])
        pages = (caches.k_pages[page], caches.v_pages[page], caches.index_k_pages[page])
        if not all(bool(torch.isfinite(values.float()).all()) for values in pages):
            return request, said + f"page {page}, its block {block}, holds NaN or infinity"
    return request, said + "query and pages are: the kernels"


def hidden_fault(hidden: Tensor, rows: Rows) -> Fault | None:
    """The first row whose hidden state is NaN or infinite.

    Parameters
    ----------
    hidden : [rows or more, hidden size], what logits are made of
    """
    finite = torch.isfinite(hidden[: len(rows.request)]).all(-1).cpu()
    if bool(finite.all()):
        return None
    row = int(torch.nonzero(~finite)[0])
    return int(rows.request[row]), (
        f"the hidden state at position {int(rows.position[row])} is not finite; what MSA gave was: "
        "its layer's experts, a layer behind it, or the host's kernels"
    )


class StepChecker:
    """Checks every n-th step of a session.

    Parameters
    ----------
    every : 1 checks every step
    msa : the model's rules
    """

    def __init__(self, every: int, msa: MSAConfig) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1; got {every}")
        self.every = every
        self.msa = msa
        # how the host calls the requests of the step that runs now, if the batch does not say
        self.names: Callable[[], Sequence[str]] = tuple
        self._plan: MSAPlan | None = None
        self._rows: Rows | None = None
        self._step = -1
        self._layer = 0
        # whether a layer has run since `end`
        self._begun = False
        self._warned = False

    def replanned(self) -> None:
        """What was looked at has changed in place, as it does while drafting: another step."""
        self._plan = None

    def before(self, plan: MSAPlan, *, caches: MSACaches) -> None:
        """A layer is about to store; the first of a step checks the step.

        Raises
        ------
        StepCheckError : the step must not run.
        """
        if self._is_captured(caches.k_pages):
            return
        self._begun = True
        if plan is not self._plan:
            self._plan, self._rows = plan, None
            self._step += 1
            self._layer = -1
            if self._step % self.every == 0:
                pages, page_size = caches.index_k_pages.shape[:2]
                fault = batch_fault(plan.batch, num_pages=pages, page_size=page_size)
                self._refuse(fault, plan)
                self._rows = Rows.of(plan.batch)
                count_checked_step()
        self._layer += 1

    def after(
        self, plan: MSAPlan, q: Tensor, block_ids: Tensor, out: Tensor, *, caches: MSACaches
    ) -> None:
        """A layer has run.

        Raises
        ------
        StepCheckError : what it chose or computed must not be served.
        """
        if self._rows is None or self._is_captured(caches.k_pages):
            return
        page_size = caches.index_k_pages.shape[1]
        self._refuse(
            selection_fault(block_ids, self._rows, msa=self.msa, page_size=page_size), plan
        )
        self._refuse(
            output_fault(out, q, block_ids, self._rows, batch=plan.batch, caches=caches), plan
        )

    def together(self, plan: MSAPlan, block_ids: Tensor, alone: Callable[[], Tensor]) -> None:
        """Ranks have shared out a scan: in a step that is looked at, scan all blocks here as well.

        Raises
        ------
        StepCheckError : the choice is another.
        """
        if self._rows is None or self._is_captured(block_ids):
            return
        self._refuse(sharing_fault(block_ids, alone(), self._rows), plan)

    def end(self, hidden: Tensor) -> None:
        """The model has run; nothing is looked at where no layer of ours had a part in that.

        Parameters
        ----------
        hidden : [rows, hidden size], behind the last norm

        Raises
        ------
        StepCheckError : what it gave must not be served.
        """
        begun, self._begun = self._begun, False
        if not begun or self._rows is None or self._plan is None or self._is_captured(hidden):
            return
        self._refuse(hidden_fault(hidden, self._rows), self._plan, where=", behind the last layer")

    def _refuse(self, fault: Fault | None, plan: MSAPlan, *, where: str | None = None) -> None:
        if fault is None:
            return
        request, words = fault
        if where is None:
            where = "" if self._layer < 0 else f", MSA layer {self._layer} of the step"
        who = "the step" if request is None else self._name(request, plan)
        message = f"{VARIABLE}: step {self._step}{where}: {who}: {words}"
        logger.error("m3-plugin: %s", message)
        raise StepCheckError(message)

    def _name(self, request: int, plan: MSAPlan) -> str:
        names = plan.batch.requests or self.names()
        called = f" {names[request]!r}" if request < len(names) else ""
        return (
            f"request{called} ({request} of {plan.batch.num_reqs}, "
            f"{int(plan.batch.seq_lens[request])} tokens)"
        )

    def _is_captured(self, read: Tensor) -> bool:
        captured = read.is_cuda and torch.cuda.is_current_stream_capturing()
        if captured and not self._warned:
            self._warned = True
            logger.warning(
                "m3-plugin: %s sees no step that a CUDA graph replays; serve eagerly to have all "
                "of them checked",
                VARIABLE,
            )
        return captured


def _few(values: Tensor) -> str:
    shown = values.tolist()
    return f"{shown[:8]}{' ...' if len(shown) > 8 else ''}"
